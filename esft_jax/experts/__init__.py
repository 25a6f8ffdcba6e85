"""Which experts matter for a task: routing scores, selection, and the expert configuration file."""
