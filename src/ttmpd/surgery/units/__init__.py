"""What can be removed: ``find``, ``mask``, ``cut``."""
