"""Attention in plain XLA, for any platform."""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from esft_jax.ops.attention.operation import KEPT, check_operands

# Queries per block, at least and at most: scores exist for one block at a time, and a block meets
# no key after its own last query.
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512
# A row is cut into as many blocks until they would be longer than the largest: each is a piece of
# program of its own.
BLOCKS = 16

_HIDDEN = jnp.finfo(jnp.float32).min


def masked_attention(
    query: Float[Array, "B Q H R"],
    key: Float[Array, "B S H R"],
    value: Float[Array, "B S H W"],
    visible: Bool[Array, "B Q S"],
    scale: float,
) -> Float[Array, "B Q H W"]:
    """Softmax attention, softmax in float32. A query that sees nothing returns a mean of values,
    never NaN.

    Raises:
        ValueError: types or shapes that do not fit together.
    """
    check_operands(query, key, value)
    expected = (len(query), query.shape[1], key.shape[1])
    if visible.dtype != bool or visible.shape != expected:
        raise ValueError(
            f"attention: visible is {visible.dtype} {visible.shape}; expected bool {expected}"
        )
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return _attend(query, key, value, visible, scale)[0].swapaxes(1, 2)


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S H R"],
    value: Float[Array, "B S H W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
) -> Float[Array, "B S H W"]:
    """As `operation.causal_attention`, a block of queries at a time.

    The backward pass makes scores again from the queries, the keys, and one number per query
    (FlashAttention-2, arXiv 2307.08691): nothing of size `[S, S]` is kept.
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return _causal_attention(query, key, value, segment_ids, scale).swapaxes(1, 2)


def _attend(
    query: Float[Array, "B H Q R"],
    key: Float[Array, "B H S R"],
    value: Float[Array, "B H S W"],
    visible: Bool[Array, "B Q S"],
    scale: float,
) -> tuple[Float[Array, "B H Q W"], Float[Array, "B H Q"]]:
    """The mixed values, and the logarithm of each query's softmax denominator."""
    scores = _scores(query, key, visible, scale)
    top = scores.max(axis=-1, keepdims=True)
    # Dividing by the sum after the product with the values passes over [Q, S] less often.
    weights = jnp.exp(scores - top)
    total = weights.sum(axis=-1)
    mixed = _product("bhqs,bhsw->bhqw", weights.astype(value.dtype), value)
    return (mixed / total[..., None]).astype(value.dtype), top[..., 0] + jnp.log(total)


def _scores(query: Array, key: Array, visible: Array, scale: float) -> Float[Array, "B H Q S"]:
    scores = _product("bhqr,bhsr->bhqs", query, key)
    return jnp.where(visible[:, None], scores * scale, _HIDDEN)


def _product(formula: str, *arrays: Array) -> Float[Array, "..."]:
    return jnp.einsum(formula, *arrays, preferred_element_type=jnp.float32)


def _blocks(segment_ids: Int[Array, "B S"]) -> Iterator[tuple[slice, slice, Bool[Array, "B Q K"]]]:
    """For each block: its queries, the keys up to its last query, and which of them each sees."""
    length = segment_ids.shape[1]
    size = min(max(-(-length // BLOCKS), SMALLEST_BLOCK), LARGEST_BLOCK)
    index = jnp.arange(length)
    for start in range(0, length, size):
        queries, keys = slice(start, start + size), slice(0, min(start + size, length))
        same = segment_ids[:, queries, None] == segment_ids[:, None, keys]
        yield queries, keys, same & (index[keys] <= index[queries, None])


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal_attention(
    query: Array, key: Array, value: Array, segment_ids: Array, scale: float
) -> Float[Array, "B H S W"]:
    return _forward(query, key, value, segment_ids, scale)[0]


def _forward(
    query: Array, key: Array, value: Array, segment_ids: Array, scale: float
) -> tuple[Array, tuple]:
    parts = [
        _attend(query[:, :, queries], key[:, :, keys], value[:, :, keys], visible, scale)
        for queries, keys, visible in _blocks(segment_ids)
    ]
    mixed, denominators = (
        checkpoint_name(jnp.concatenate(part, axis=2), KEPT) for part in zip(*parts, strict=True)
    )
    return mixed, (query, key, value, segment_ids, mixed, denominators)


def _backward(scale: float, residuals: tuple, grad: Float[Array, "B H S W"]) -> tuple:
    query, key, value, segment_ids, mixed, denominators = residuals
    # What the softmax takes off every score's gradient: sum_s weight_s * (grad . value_s).
    mean = _product("bhqw,bhqw->bhq", grad, mixed)
    dqueries = []
    dkey, dvalue = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    for queries, keys, visible in _blocks(segment_ids):
        q, g, k, v = query[:, :, queries], grad[:, :, queries], key[:, :, keys], value[:, :, keys]
        weights = jnp.exp(_scores(q, k, visible, scale) - denominators[:, :, queries, None])
        dweights = _product("bhqw,bhsw->bhqs", g, v)
        dscores = (weights * (dweights - mean[:, :, queries, None]) * scale).astype(q.dtype)
        dqueries.append(_product("bhqs,bhsr->bhqr", dscores, k).astype(q.dtype))
        dkey = dkey.at[:, :, keys].add(_product("bhqs,bhqr->bhsr", dscores, q))
        weights = weights.astype(g.dtype)
        dvalue = dvalue.at[:, :, keys].add(_product("bhqs,bhqw->bhsw", weights, g))
    dquery = jnp.concatenate(dqueries, axis=2)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), None


_causal_attention.defvjp(_forward, _backward)
