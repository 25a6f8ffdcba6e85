"""Attention over packed documents, and over a cache."""

from esft_jax.ops.attention.operation import causal_attention
from esft_jax.ops.attention.xla import masked_attention

__all__ = ["causal_attention", "masked_attention"]
