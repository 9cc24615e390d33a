"""What runs a model when its latency is measured: one file each."""
