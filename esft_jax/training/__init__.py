"""Training: optimizer, step, checkpoints, and the loop around them."""
