"""The verbs joined; one file per function that a user calls."""
