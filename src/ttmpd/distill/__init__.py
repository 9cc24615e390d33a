"""Methods that train the student to recover, from the teacher's outputs."""
