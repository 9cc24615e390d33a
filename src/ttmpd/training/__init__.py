"""Gradient descent, and what it is checked by."""
