"""Kernels and a small training step on the device at hand, against what they should give."""
