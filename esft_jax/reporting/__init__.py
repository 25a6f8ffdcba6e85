"""What scores and routing say of a task, as a page that a stranger can read."""
