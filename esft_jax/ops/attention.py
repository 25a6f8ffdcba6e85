"""Causal attention over packed documents."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Queries per block: bounds the score matrix to [B, H, block, S] instead of [B, H, S, S].
QUERY_BLOCK = 512


def masked_attention(
    query: Float[Array, "B Q H R"],
    key: Float[Array, "B S H R"],
    value: Float[Array, "B S H W"],
    visible: Bool[Array, "B Q S"],
    scale: float,
) -> Float[Array, "B Q H W"]:
    """Softmax attention, softmax in float32. A query that sees nothing returns a mean of values,
    never NaN.
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhqr,bhsr->bhqs", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None], scores * scale, jnp.finfo(jnp.float32).min)
    # Dividing by the sum after the product with the values passes over [Q, S] less often.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum(
        "bhqs,bhsw->bhqw", weights.astype(value.dtype), value, preferred_element_type=jnp.float32
    )
    mixed = mixed / weights.sum(axis=-1)[..., None]
    return mixed.astype(value.dtype).swapaxes(1, 2)


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S H R"],
    value: Float[Array, "B S H W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
) -> Float[Array, "B S H W"]:
    """Attention to earlier tokens of the same segment, a block of queries at a time.

    Long rows recompute a block's scores in the backward pass instead of keeping them.
    """
    length = query.shape[1]
    index = jnp.arange(length)

    def block(q: Array, q_segments: Array, q_index: Array) -> Array:
        visible = (q_segments[:, :, None] == segment_ids[:, None, :]) & (index <= q_index[:, None])[
            None
        ]
        return masked_attention(q, key, value, visible, scale)

    if length <= QUERY_BLOCK:
        return block(query, segment_ids, index)
    blocks = math.ceil(length / QUERY_BLOCK)
    missing = blocks * QUERY_BLOCK - length

    def split(x: Array) -> Array:
        # Queries that nobody reads fill the last block.
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], blocks, QUERY_BLOCK, *x.shape[2:]), 1, 0)

    out = jax.lax.map(
        lambda args: jax.checkpoint(block)(*args),
        (split(query), split(segment_ids), split(index[None])[:, 0]),
    )
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *out.shape[3:])
    return out[:, :length]
