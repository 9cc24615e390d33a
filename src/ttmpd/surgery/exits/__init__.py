"""A model that may answer early."""
