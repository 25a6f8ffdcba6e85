"""Which experts matter for a task: scores of routing, and selection by them."""
