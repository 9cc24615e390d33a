"""What a model predicts: one file per task."""
