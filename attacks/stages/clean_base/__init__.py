"""Stages that compare the suspect with the clean base that it was trained from, where that is known (K2)."""
