"""How the student recovers, from the teacher's answers."""
