"""Adapt the teacher to the data before it makes pseudo labels."""
