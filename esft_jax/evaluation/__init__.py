"""Measuring a model on a task: generation, metrics, completions files."""
