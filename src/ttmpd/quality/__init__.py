"""How good predictions are, without labels or with."""
