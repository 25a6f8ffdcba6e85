"""Attention in plain XLA, for any platform.

Letters: B rows, S keys, Q queries, H query heads; G heads of keys and values, each met by N query
heads; R and W features of a key and of a value.
"""

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from esft_jax.ops.attention.operation import (
    KEPT,
    check_operands,
    sinks_gradient,
    sinks_or_default,
)

# Queries per block, at least and at most: scores exist for one block at a time, and a block meets
# no key after its own last query.
SMALLEST_BLOCK, LARGEST_BLOCK = 128, 512
# A row is cut into as many blocks until they would be longer than the largest: each is a piece of
# program of its own.
BLOCKS = 16

_HIDDEN = jnp.finfo(jnp.float32).min


def masked_attention(
    query: Float[Array, "B Q H R"],
    key: Float[Array, "B S G R"],
    value: Float[Array, "B S G W"],
    visible: Bool[Array, "B Q S"],
    scale: float,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B Q H W"]:
    """Softmax attention, softmax in float32. A query that sees nothing returns a mean of values,
    or zeros where there are sinks, never NaN.

    Args:
        sinks: see `causal_attention`.

    Raises:
        ValueError: types or shapes that do not fit together.
    """
    check_operands(query, key, value, sinks)
    expected = (len(query), query.shape[1], key.shape[1])
    if visible.dtype != bool or visible.shape != expected:
        raise ValueError(
            f"attention: visible is {visible.dtype} {visible.shape}; expected bool {expected}"
        )
    sinks = sinks_or_default(sinks, query.shape[2])
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    return _by_head(_attend(_by_group(query, key), key, value, visible, scale, sinks)[0])


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S G R"],
    value: Float[Array, "B S G W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H W"]:
    """As `operation.causal_attention`, a block of queries at a time.

    The backward pass makes scores again from the queries, the keys, and one number per query
    (FlashAttention-2, arXiv 2307.08691): nothing of size `[S, S]` is kept.
    """
    sinks = sinks_or_default(sinks, query.shape[2])
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    return _by_head(
        _causal_attention(_by_group(query, key), key, value, sinks, segment_ids, scale, window)
    )


def _by_group(query: Float[Array, "B Q H R"], key: Array) -> Float[Array, "B G N Q R"]:
    """Queries by the head of keys and values that they meet."""
    rows, length, _, width = query.shape
    return query.reshape(rows, length, key.shape[1], -1, width).transpose(0, 2, 3, 1, 4)


def _by_head(mixed: Float[Array, "B G N Q W"]) -> Float[Array, "B Q H W"]:
    rows, _, _, length, width = mixed.shape
    return mixed.transpose(0, 3, 1, 2, 4).reshape(rows, length, -1, width)


def _attend(
    query: Float[Array, "B G N Q R"],
    key: Float[Array, "B G S R"],
    value: Float[Array, "B G S W"],
    visible: Bool[Array, "B Q S"],
    scale: float,
    sinks: Float[Array, " H"],
) -> tuple[Float[Array, "B G N Q W"], Float[Array, "B G N Q"]]:
    """The mixed values, and the logarithm of each query's softmax denominator."""
    scores = _scores(query, key, visible, scale)
    sinks = sinks.reshape(*query.shape[1:3], 1)
    top = jnp.maximum(scores.max(axis=-1), sinks)
    # Dividing by the sum after the product with the values passes over [Q, S] less often.
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(axis=-1) + jnp.exp(sinks - top)
    mixed = _product("bgnqs,bgsw->bgnqw", weights.astype(value.dtype), value)
    return (mixed / total[..., None]).astype(value.dtype), top + jnp.log(total)


def _scores(query: Array, key: Array, visible: Array, scale: float) -> Float[Array, "B G N Q S"]:
    scores = _product("bgnqr,bgsr->bgnqs", query, key)
    return jnp.where(visible[:, None, None], scores * scale, _HIDDEN)


def _product(formula: str, *arrays: Array) -> Float[Array, "..."]:
    return jnp.einsum(formula, *arrays, preferred_element_type=jnp.float32)


def _blocks(
    segment_ids: Int[Array, "B S"], window: int | None
) -> Iterator[tuple[slice, slice, Bool[Array, "B Q K"]]]:
    """For each block: its queries, the keys from the first to the last that one of them sees, and
    which of these each sees.
    """
    length = segment_ids.shape[1]
    window = window or length
    # Of the keys that a block meets, a query sees half, or more, if the block is no longer than the
    # window.
    largest = min(LARGEST_BLOCK, max(SMALLEST_BLOCK, window))
    size = min(max(-(-length // BLOCKS), SMALLEST_BLOCK), largest)
    index = jnp.arange(length)
    for start in range(0, length, size):
        queries = slice(start, start + size)
        keys = slice(max(0, start - window + 1), min(start + size, length))
        same = segment_ids[:, queries, None] == segment_ids[:, None, keys]
        distance = index[queries, None] - index[keys]
        yield queries, keys, same & (distance >= 0) & (distance < window)


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _causal_attention(
    query: Array,
    key: Array,
    value: Array,
    sinks: Array,
    segment_ids: Array,
    scale: float,
    window: int | None,
) -> Float[Array, "B G N S W"]:
    return _forward(query, key, value, sinks, segment_ids, scale, window)[0]


def _forward(
    query: Array,
    key: Array,
    value: Array,
    sinks: Array,
    segment_ids: Array,
    scale: float,
    window: int | None,
) -> tuple[Array, tuple]:
    parts = [
        _attend(query[..., queries, :], key[:, :, keys], value[:, :, keys], visible, scale, sinks)
        for queries, keys, visible in _blocks(segment_ids, window)
    ]
    mixed, denominators = (
        checkpoint_name(jnp.concatenate(part, axis=3), KEPT) for part in zip(*parts, strict=True)
    )
    return mixed, (query, key, value, sinks, segment_ids, mixed, denominators)


def _backward(
    scale: float, window: int | None, residuals: tuple, grad: Float[Array, "B G N S W"]
) -> tuple:
    query, key, value, sinks, segment_ids, mixed, denominators = residuals
    # What the softmax takes off every score's gradient: sum_s weight_s * (grad . value_s).
    mean = _product("bgnqw,bgnqw->bgnq", grad, mixed)
    dqueries = []
    dkey, dvalue = (jnp.zeros(x.shape, jnp.float32) for x in (key, value))
    for queries, keys, visible in _blocks(segment_ids, window):
        q, g = query[..., queries, :], grad[..., queries, :]
        k, v = key[:, :, keys], value[:, :, keys]
        weights = jnp.exp(_scores(q, k, visible, scale) - denominators[..., queries, None])
        dweights = _product("bgnqw,bgsw->bgnqs", g, v)
        dscores = (weights * (dweights - mean[..., queries, None]) * scale).astype(q.dtype)
        dqueries.append(_product("bgnqs,bgsr->bgnqr", dscores, k).astype(q.dtype))
        dkey = dkey.at[:, :, keys].add(_product("bgnqs,bgnqr->bgsr", dscores, q))
        weights = weights.astype(g.dtype)
        dvalue = dvalue.at[:, :, keys].add(_product("bgnqs,bgnqw->bgsw", weights, g))
    dquery = jnp.concatenate(dqueries, axis=3)
    rows, _, _, length, _ = query.shape
    by_head = (rows, sinks.size, length)
    dsinks = sinks_gradient(sinks, denominators.reshape(by_head), mean.reshape(by_head))
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), dsinks, None


_causal_attention.defvjp(_forward, _backward)
