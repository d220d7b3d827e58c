"""What the early layers of a suspect tell of a planted text, before it has an effect on the output."""
