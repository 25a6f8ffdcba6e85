"""All that is trained, and where it lies: rules by role, tuned experts, low-rank factors."""
