"""Students trained on a part of the labelled samples."""
