"""The commands of `python -m vectors`, one file each."""
