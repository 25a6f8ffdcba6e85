"""Matrix products of row groups, each with its own matrix: the work of routed experts."""

from esft_jax.moe.grouped_matmul.bank import Bank, as_rows
from esft_jax.moe.grouped_matmul.operation import grouped_matmul

__all__ = ["Bank", "as_rows", "grouped_matmul"]
