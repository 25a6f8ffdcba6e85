"""Comparing methods: the same runs for many methods, tasks and seeds."""
