"""Phrases put together by how their words interact in early layers, in the directions that the behaviour depends on."""
