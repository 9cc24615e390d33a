"""Runtimes that run a model when its latency is measured: one file each."""
