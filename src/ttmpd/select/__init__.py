"""Methods that choose, from a larger pool, the samples that the student is fitted on; they need no labels."""
