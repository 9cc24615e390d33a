"""Milliseconds on this device."""
