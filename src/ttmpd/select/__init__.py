"""Which samples of a larger pool the student is fitted on, chosen without labels."""
