"""Matrix products of row groups, each with its own matrix: the work of routed experts."""

from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.moe.grouped_matmul.operation import grouped_matmul

__all__ = ["Bank", "grouped_matmul"]
