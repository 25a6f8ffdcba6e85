"""Adapters in the engines that serve models: what runs in their processes, without JAX."""
