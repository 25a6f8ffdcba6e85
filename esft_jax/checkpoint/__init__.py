"""Hugging Face checkpoints in and out: load, convert, adapters, export."""
