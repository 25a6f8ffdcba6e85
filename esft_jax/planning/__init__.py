"""Whether a training step fits a slice that nobody needs to own, and what it costs there."""
