"""A model, opened and looked at."""
