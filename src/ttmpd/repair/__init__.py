"""Closed-form least squares after a removal."""
