"""Attention on GPUs: Pallas kernels compiled by Triton (FlashAttention-2, arXiv 2307.08691).

A program of the forward pass holds a block of queries and goes through the keys up to its last one;
those of the backward pass do so for a block of queries, and for a block of keys and values. No
other kernels fit: cuDNN's, behind `jax.nn.dot_product_attention`, take no keys of width 192 beside
values of width 128; those of JAX are deprecated; their successors in tokamax take documents as a
mask of `[S, S]` only. On CPU these run in Pallas' interpreter, for tests.

Letters: B rows, S tokens of each, H query heads, G heads of keys and values, R and W features of a
key and of a value; Q queries and K keys of a tile.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from esft_jax.ops.attention.operation import KEPT
from esft_jax.ops.platform import target_platform
from esft_jax.ops.triton_tiles import Part, load, load_line, store, store_line

# Queries and keys of a tile of scores. With heads of width 192, which registers hold as 256, larger
# ones exceed shared memory.
FORWARD_QUERIES, FORWARD_KEYS, GRADIENT = 64, 32, 32

_HIDDEN = -1e30  # below every score, and finite: differences of two are no NaN


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S G R"],
    value: Float[Array, "B S G W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
) -> Float[Array, "B S H W"]:
    """As `operation.causal_attention`."""
    return _causal_attention(scale, query, key, value, segment_ids.astype(jnp.int32))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_attention(
    scale: float, query: Array, key: Array, value: Array, segment_ids: Array
) -> Float[Array, "B S H W"]:
    return _forward(scale, query, key, value, segment_ids)[0]


def _forward(
    scale: float, query: Array, key: Array, value: Array, segment_ids: Array
) -> tuple[Array, tuple]:
    batch, length, heads, _ = query.shape
    mixed, denominators = _call(
        partial(_forward_kernel, sizes=_Sizes.of(query, value), scale=scale),
        (query, key, value, segment_ids),
        (
            jax.ShapeDtypeStruct((batch, length, heads, value.shape[3]), value.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        block=FORWARD_QUERIES,
        warps=8,
        name="attention_forward",
    )
    mixed, denominators = (checkpoint_name(x, KEPT) for x in (mixed, denominators))
    return mixed, (query, key, value, segment_ids, mixed, denominators)


def _backward(scale: float, residuals: tuple, grad: Float[Array, "B S H W"]) -> tuple:
    query, key, value, segment_ids, mixed, denominators = residuals
    # What the softmax takes off every score's gradient: sum_s weight_s * (grad . value_s).
    mean = jnp.einsum("bshw,bshw->bhs", grad, mixed, preferred_element_type=jnp.float32)
    operands = (query, key, value, segment_ids, grad, denominators, mean)
    sizes = _Sizes.of(query, value)
    batch, length, heads, _ = query.shape
    # Each head of queries adds a part to what its head of keys and values gets.
    shapes = [
        jax.ShapeDtypeStruct((batch, length, heads, x.shape[3]), x.dtype)
        for x in (query, key, value)
    ]
    options = {"block": GRADIENT, "warps": 4}
    (dquery,) = _call(
        partial(_query_gradient_kernel, sizes=sizes, scale=scale),
        operands,
        shapes[:1],
        name="attention_query_gradient",
        **options,
    )
    dkey, dvalue = _call(
        partial(_key_gradient_kernel, sizes=sizes, scale=scale),
        operands,
        shapes[1:],
        name="attention_key_gradient",
        **options,
    )

    def added(parts: Array, heads: int) -> Array:
        if parts.shape[2] == heads:
            return parts
        groups = parts.reshape(batch, length, heads, -1, parts.shape[3])
        return groups.astype(jnp.float32).sum(axis=3).astype(parts.dtype)

    return dquery, added(dkey, key.shape[2]), added(dvalue, value.shape[2]), None


_causal_attention.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    operands: tuple[Array, ...],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    block: int,
    warps: int,
    name: str,
) -> Sequence[Array]:
    """Run a program for each block of tokens of each head of each row.

    The kernel sees the matrices `[S, _]` of its head, and the segments of its row.
    """
    batch, length, heads, _ = operands[0].shape

    def spec(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        match x.ndim:
            case 4:
                width = pl.next_power_of_2(x.shape[3])
                together = heads // x.shape[2]  # heads of queries to one of keys and values
                return pl.BlockSpec(
                    (None, length, None, width), lambda _, b, h: (b, 0, h // together, 0)
                )
            case 3:
                return pl.BlockSpec((None, None, length), lambda _, b, h: (b, h, 0))
        return pl.BlockSpec((None, length), lambda _, b, h: (b, 0))

    run = pl.pallas_call(
        kernel,
        out_shape=results,
        grid=(pl.cdiv(length, block), batch, heads),
        in_specs=[*map(spec, operands)],
        out_specs=[*map(spec, results)],
        compiler_params=triton.CompilerParams(num_warps=warps, num_stages=2),
        interpret=target_platform() == "cpu",
        name=name,
    )
    # Unlike a kernel, a call is left out where its results are not used, as in `jax.checkpoint`.
    return jax.jit(run)(*operands)


class _Sizes(NamedTuple):
    """Of the matrices of a head: rows, and columns that count. There are powers of two of them."""

    length: int
    width: int
    value_width: int

    @classmethod
    def of(cls, query: Array, value: Array) -> "_Sizes":
        return cls(query.shape[1], query.shape[3], value.shape[3])

    def tokens(self, block: Array | int, size: int) -> Part:
        """A block of tokens. The last one may go past the row."""
        return Part(block * size, size, self.length)

    @property
    def columns(self) -> Part:
        """Of queries and keys."""
        return Part(0, pl.next_power_of_2(self.width), self.width)

    @property
    def value_columns(self) -> Part:
        """Of values and results."""
        return Part(0, pl.next_power_of_2(self.value_width), self.value_width)


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Float[Array, "_ _"]:
    """Sums over these axes, in float32."""
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _scores(
    query: Array, key: Array, segments: jax.Ref, queries: Part, keys: Part, scale: float
) -> tuple[Float[Array, "Q K"], Bool[Array, "Q K"]]:
    """Logarithms to base 2 of what the softmax adds up, and which of them a query sees.

    No query of the row sees what is read past its end.
    """
    index = queries.start + jnp.arange(queries.size)
    later = keys.start + jnp.arange(keys.size)
    same = load_line(segments, queries)[:, None] == load_line(segments, keys)[None]
    visible = same & (index[:, None] >= later[None])
    return _product(query, key, 1, 1) * (scale * math.log2(math.e)), visible


def _forward_kernel(
    query: jax.Ref,
    key: jax.Ref,
    value: jax.Ref,
    segments: jax.Ref,
    mixed: jax.Ref,
    denominators: jax.Ref,
    *,
    sizes: _Sizes,
    scale: float,
) -> None:
    queries = sizes.tokens(pl.program_id(0), FORWARD_QUERIES)
    q = load(query, queries, sizes.columns)

    def step(i: Array, carry: tuple) -> tuple:
        before, total, out = carry
        keys = sizes.tokens(i, FORWARD_KEYS)
        k, v = load(key, keys, sizes.columns), load(value, keys, sizes.value_columns)
        scores, visible = _scores(q, k, segments, queries, keys, scale)
        top = jnp.maximum(before, jnp.where(visible, scores, _HIDDEN).max(axis=1))
        weights = jnp.where(visible, jnp.exp2(scores - top[:, None]), 0)
        shrink = jnp.exp2(before - top)
        out = out * shrink[:, None] + _product(weights.astype(v.dtype), v, 1, 0)
        return top, total * shrink + weights.sum(axis=1), out

    zeros = jnp.zeros(queries.size, jnp.float32)
    out = jnp.zeros((queries.size, sizes.value_columns.size), jnp.float32)
    end = pl.cdiv(jnp.minimum(queries.start + queries.size, sizes.length), FORWARD_KEYS)
    top, total, out = jax.lax.fori_loop(0, end, step, (zeros + _HIDDEN, zeros, out))
    store(mixed, out / total[:, None], queries, sizes.value_columns)
    store_line(denominators, top + jnp.log2(total), queries)


def _score_gradients(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    segments: jax.Ref,
    denominators: jax.Ref,
    mean: jax.Ref,
    queries: Part,
    keys: Part,
    scale: float,
) -> tuple[Float[Array, "Q K"], Float[Array, "Q K"]]:
    """The softmax' weights, and the gradients of the products of queries and keys."""
    scores, visible = _scores(q, k, segments, queries, keys, scale)
    weights = jnp.exp2(scores - load_line(denominators, queries)[:, None])
    weights = jnp.where(visible, weights, 0)
    means = load_line(mean, queries)[:, None]
    return weights, weights * (_product(g, v, 1, 1) - means) * scale


def _query_gradient_kernel(
    query: jax.Ref,
    key: jax.Ref,
    value: jax.Ref,
    segments: jax.Ref,
    grad: jax.Ref,
    denominators: jax.Ref,
    mean: jax.Ref,
    dquery: jax.Ref,
    *,
    sizes: _Sizes,
    scale: float,
) -> None:
    queries = sizes.tokens(pl.program_id(0), GRADIENT)
    q, g = load(query, queries, sizes.columns), load(grad, queries, sizes.value_columns)
    lines = (segments, denominators, mean)

    def step(i: Array, total: Array) -> Array:
        keys = sizes.tokens(i, GRADIENT)
        k, v = load(key, keys, sizes.columns), load(value, keys, sizes.value_columns)
        _, dscores = _score_gradients(q, k, v, g, *lines, queries, keys, scale)
        return total + _product(dscores.astype(k.dtype), k, 1, 0)

    total = jnp.zeros((queries.size, sizes.columns.size), jnp.float32)
    total = jax.lax.fori_loop(0, pl.program_id(0) + 1, step, total)
    store(dquery, total, queries, sizes.columns)


def _key_gradient_kernel(
    query: jax.Ref,
    key: jax.Ref,
    value: jax.Ref,
    segments: jax.Ref,
    grad: jax.Ref,
    denominators: jax.Ref,
    mean: jax.Ref,
    dkey: jax.Ref,
    dvalue: jax.Ref,
    *,
    sizes: _Sizes,
    scale: float,
) -> None:
    keys = sizes.tokens(pl.program_id(0), GRADIENT)
    k, v = load(key, keys, sizes.columns), load(value, keys, sizes.value_columns)
    lines = (segments, denominators, mean)

    def step(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        queries = sizes.tokens(i, GRADIENT)
        q, g = load(query, queries, sizes.columns), load(grad, queries, sizes.value_columns)
        weights, dscores = _score_gradients(q, k, v, g, *lines, queries, keys, scale)
        return (
            totals[0] + _product(dscores.astype(q.dtype), q, 0, 0),
            totals[1] + _product(weights.astype(g.dtype), g, 0, 0),
        )

    zeros = tuple(
        jnp.zeros((keys.size, part.size), jnp.float32)
        for part in (sizes.columns, sizes.value_columns)
    )
    end = pl.cdiv(sizes.length, GRADIENT)
    dk, dv = jax.lax.fori_loop(pl.program_id(0), end, step, zeros)
    store(dkey, dk, keys, sizes.columns)
    store(dvalue, dv, keys, sizes.value_columns)
