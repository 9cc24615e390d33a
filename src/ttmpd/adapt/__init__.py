"""Move the teacher to the data before it is asked for pseudo labels."""
