"""What can be removed from a model, and removing it."""
