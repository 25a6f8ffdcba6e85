"""Numerical building blocks without parameters."""
