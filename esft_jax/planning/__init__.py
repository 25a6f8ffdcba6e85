"""Whether a training step fits a slice that need not be at hand, and what it costs there."""
