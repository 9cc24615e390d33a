"""A running service: answers at once, compresses beside it, watches for drift."""
