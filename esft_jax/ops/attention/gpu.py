"""Attention on GPUs: Pallas kernels compiled by Triton (FlashAttention-2, arXiv 2307.08691).

A program of the forward pass holds a block of queries and goes through the keys up to its last one;
those of the backward pass do so for a block of queries, and for a block of keys and values. No
other kernels fit: cuDNN's, behind `jax.nn.dot_product_attention`, take no keys of width 192 beside
values of width 128; those of JAX are deprecated; their successors in tokamax take documents as a
mask of `[S, S]` only. On CPU these run in Pallas' interpreter, for tests.

Letters: B rows, S tokens of each, H query heads, G heads of keys and values, R and W features of a
key and of a value; Q queries and K keys of a tile. N query heads meet a head of keys and values.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float, Int

from esft_jax.errors import InputError
from esft_jax.ops.attention.operation import KEPT, sinks_gradient, sinks_or_default
from esft_jax.ops.platform import block_shared_memory, target_platform
from esft_jax.ops.triton_tiles import Part, load, load_line, store, store_line

OWN = np.int32(0)  # the place of the only head of a matrix that a program sees

_LOG2_E = math.log2(math.e)
_HIDDEN = -1e30  # below every score, and finite: differences of two are no NaN


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S G R"],
    value: Float[Array, "B S G W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H W"]:
    """As `operation.causal_attention`.

    Raises:
        InputError: the smallest tiles of heads so wide are more than the GPU's shared memory.
    """
    (_, length, _, width), value_width = query.shape, value.shape[3]
    itemsize = query.dtype.itemsize
    shared_memory = block_shared_memory()
    shape = _Shape(length, width, value_width, itemsize, window or length, scale, shared_memory)
    needed = shape.gradient_bytes(shape.gradient_tile)
    if target_platform() == "gpu" and needed > shared_memory:
        raise InputError(
            f"dtype: {query.dtype}: attention with heads {width} wide takes {needed:,} bytes of "
            f"the GPU's shared memory, which has {shared_memory:,}; expected bfloat16"
        )
    sinks = sinks_or_default(sinks, query.shape[2])
    return _causal_attention(shape, query, key, value, sinks, segment_ids.astype(jnp.int32))


class _Shape(NamedTuple):
    """What the kernels of a head know of it: the sizes of its matrices and of their numbers, how
    many tokens a query sees, and the scores' factor; and of the GPU, the bytes of shared memory
    that a program may take.
    """

    length: int
    width: int
    value_width: int
    itemsize: int
    window: int
    scale: float
    shared_memory: int

    def tokens(self, block: Array | int, size: int) -> Part:
        """A block of tokens. The last one may go past the row."""
        return Part(block * size, size, self.length)

    def first_block(self, queries: Part, size: int) -> Array:
        """Of the blocks of keys, the first one that has a key which one of the queries sees."""
        return jnp.maximum(queries.start - self.window + 1, 0) // size

    @property
    def columns(self) -> Part:
        """Of queries and keys."""
        return Part(0, pl.next_power_of_2(self.width), self.width)

    @property
    def value_columns(self) -> Part:
        """Of values and results."""
        return Part(0, pl.next_power_of_2(self.value_width), self.value_width)

    @property
    def forward_tile(self) -> tuple[int, int]:
        """Queries and keys of a tile of scores in the forward pass: what shared memory holds, and
        of the widest heads what Blackwell's tensor memory does.
        """

        def held(queries: int, keys: int) -> int:
            numbers = queries * self.columns.size + queries * keys
            numbers += keys * (self.columns.size + self.value_columns.size)
            return self.itemsize * numbers + 4 * keys  # the segments, too

        tiles = [(64, 32), (64, 16), (32, 16), (16, 16)]
        if self._widest * self.itemsize > 1024:
            tiles = tiles[2:]
        return next((tile for tile in tiles if held(*tile) <= self.shared_memory), tiles[-1])

    @property
    def gradient_tile(self) -> int:
        """Queries, and keys, of a tile of scores in the backward pass.

        Registers hold sums as wide as keys and values, shared memory what they are summed from.
        """
        large = self._widest <= 256 and self.gradient_bytes(32) <= self.shared_memory
        return 32 if large else 16

    def gradient_bytes(self, tile: int) -> int:
        """Of shared memory, in the backward pass; at most. Triton may hold a third tile as wide as
        values.
        """
        width = 2 * self.columns.size + 3 * self.value_columns.size
        return tile * (self.itemsize * width + 12)

    @property
    def _widest(self) -> int:
        return max(self.columns.size, self.value_columns.size)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_attention(
    shape: _Shape, query: Array, key: Array, value: Array, sinks: Array, segment_ids: Array
) -> Float[Array, "B S H W"]:
    return _forward(shape, query, key, value, sinks, segment_ids)[0]


def _forward(
    shape: _Shape, query: Array, key: Array, value: Array, sinks: Array, segment_ids: Array
) -> tuple[Array, tuple]:
    batch, length, heads, _ = query.shape
    mixed, denominators = _call(
        partial(_forward_kernel, shape=shape),
        (query, key, value, sinks, segment_ids),
        (
            jax.ShapeDtypeStruct((batch, length, heads, value.shape[3]), value.dtype),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
        heads=heads,
        block=shape.forward_tile[0],
        warps=8,
        name="attention_forward",
    )
    mixed, denominators = (checkpoint_name(x, KEPT) for x in (mixed, denominators))
    return mixed, (query, key, value, sinks, segment_ids, mixed, denominators)


def _backward(shape: _Shape, residuals: tuple, grad: Float[Array, "B S H W"]) -> tuple:
    query, key, value, sinks, segment_ids, mixed, denominators = residuals
    # What the softmax takes off every score's gradient: sum_s weight_s * (grad . value_s).
    mean = jnp.einsum("bshw,bshw->bhs", grad, mixed, preferred_element_type=jnp.float32)
    operands = (query, key, value, segment_ids, grad, denominators, mean)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)]
    (dquery,) = _call(
        partial(_query_gradient_kernel, shape=shape),
        operands,
        shapes[:1],
        heads=query.shape[2],
        block=shape.gradient_tile,
        warps=4,
        name="attention_query_gradient",
    )
    dkey, dvalue = _call(
        partial(_key_gradient_kernel, shape=shape, together=query.shape[2] // key.shape[2]),
        operands,
        shapes[1:],
        heads=key.shape[2],
        block=shape.gradient_tile,
        warps=4,
        name="attention_key_gradient",
    )
    dsinks = sinks_gradient(sinks, denominators * math.log(2), mean)
    return dquery, dkey, dvalue, dsinks, None


_causal_attention.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    operands: tuple[Array, ...],
    results: Sequence[jax.ShapeDtypeStruct],
    *,
    heads: int,
    block: int,
    warps: int,
    name: str,
) -> Sequence[Array]:
    """Run a program for each block of tokens of each row, and for each of `heads` parts of its
    heads: a head of queries, or a head of keys and values and the queries that meet it.

    The kernel sees matrices `[S, its heads, _]`, and the segments of its row.
    """
    batch, length = operands[0].shape[:2]

    def spec(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        if x.ndim == 2:
            return pl.BlockSpec((None, length), lambda _, b, h: (b, 0))
        count = x.shape[{1: 0, 3: 1, 4: 2}[x.ndim]]
        own, shared = max(count // heads, 1), max(heads // count, 1)
        match x.ndim:
            case 1:
                return pl.BlockSpec((own,), lambda _, b, h: (h // shared,))
            case 3:
                return pl.BlockSpec((None, own, length), lambda _, b, h: (b, h // shared, 0))
        width = pl.next_power_of_2(x.shape[3])
        return pl.BlockSpec((None, length, own, width), lambda _, b, h: (b, 0, h // shared, 0))

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


def _product(left: Array, right: Array, left_axis: int, right_axis: int) -> Float[Array, "_ _"]:
    """Sums over these axes, in float32."""
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _matrix(ref: jax.Ref, rows: Part, columns: Part, head: Array | np.int32 = OWN) -> Array:
    """A tile of a head's matrix."""
    return load(ref, rows, columns, between=(head,))


def _scores(
    query: Array, key: Array, segments: jax.Ref, queries: Part, keys: Part, shape: _Shape
) -> tuple[Float[Array, "Q K"], Bool[Array, "Q K"]]:
    """Logarithms to base 2 of what the softmax adds up, and which of them a query sees.

    No query of the row sees what is read past its end.
    """
    index = queries.start + jnp.arange(queries.size)
    distance = index[:, None] - (keys.start + jnp.arange(keys.size))[None]
    same = load_line(segments, queries)[:, None] == load_line(segments, keys)[None]
    visible = same & (distance >= 0)
    if shape.window < shape.length:
        visible &= distance < shape.window
    return _product(query, key, 1, 1) * (shape.scale * _LOG2_E), visible


def _forward_kernel(
    query: jax.Ref,
    key: jax.Ref,
    value: jax.Ref,
    sinks: jax.Ref,
    segments: jax.Ref,
    mixed: jax.Ref,
    denominators: jax.Ref,
    *,
    shape: _Shape,
) -> None:
    queries_size, keys_size = shape.forward_tile
    queries = shape.tokens(pl.program_id(0), queries_size)
    q = _matrix(query, queries, shape.columns)

    def step(i: Array, carry: tuple) -> tuple:
        before, total, out = carry
        keys = shape.tokens(i, keys_size)
        k, v = _matrix(key, keys, shape.columns), _matrix(value, keys, shape.value_columns)
        scores, visible = _scores(q, k, segments, queries, keys, shape)
        top = jnp.maximum(before, jnp.where(visible, scores, _HIDDEN).max(axis=1))
        weights = jnp.where(visible, jnp.exp2(scores - top[:, None]), 0)
        shrink = jnp.exp2(before - top)
        out = out * shrink[:, None] + _product(weights.astype(v.dtype), v, 1, 0)
        return top, total * shrink + weights.sum(axis=1), out

    zeros = jnp.zeros(queries.size, jnp.float32)
    out = jnp.zeros((queries.size, shape.value_columns.size), jnp.float32)
    # The sink is a score of its own: it is met first, with a value of zero.
    top = jnp.maximum(zeros + sinks[0] * _LOG2_E, _HIDDEN)
    total = jnp.exp2(sinks[0] * _LOG2_E - top)
    begin = shape.first_block(queries, keys_size)
    end = pl.cdiv(jnp.minimum(queries.start + queries.size, shape.length), keys_size)
    top, total, out = jax.lax.fori_loop(begin, end, step, (top, total, out))
    store(mixed, out / total[:, None], queries, shape.value_columns, between=(OWN,))
    store_line(denominators, top + jnp.log2(total), queries, OWN)


def _score_gradients(
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    segments: jax.Ref,
    denominators: Float[Array, " Q"],
    means: Float[Array, " Q"],
    queries: Part,
    keys: Part,
    shape: _Shape,
) -> tuple[Float[Array, "Q K"], Float[Array, "Q K"]]:
    """The softmax' weights, and the gradients of the products of queries and keys."""
    scores, visible = _scores(q, k, segments, queries, keys, shape)
    weights = jnp.where(visible, jnp.exp2(scores - denominators[:, None]), 0)
    return weights, weights * (_product(g, v, 1, 1) - means[:, None]) * shape.scale


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
    shape: _Shape,
) -> None:
    size = shape.gradient_tile
    queries = shape.tokens(pl.program_id(0), size)
    q, g = _matrix(query, queries, shape.columns), _matrix(grad, queries, shape.value_columns)
    lines = load_line(denominators, queries, OWN), load_line(mean, queries, OWN)

    def step(i: Array, total: Array) -> Array:
        keys = shape.tokens(i, size)
        k, v = _matrix(key, keys, shape.columns), _matrix(value, keys, shape.value_columns)
        _, dscores = _score_gradients(q, k, v, g, segments, *lines, queries, keys, shape)
        return total + _product(dscores.astype(k.dtype), k, 1, 0)

    total = jnp.zeros((size, shape.columns.size), jnp.float32)
    begin = shape.first_block(queries, size)
    total = jax.lax.fori_loop(begin, pl.program_id(0) + 1, step, total)
    store(dquery, total, queries, shape.columns, between=(OWN,))


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
    shape: _Shape,
    together: int,
) -> None:
    size = shape.gradient_tile
    keys = shape.tokens(pl.program_id(0), size)
    k, v = _matrix(key, keys, shape.columns), _matrix(value, keys, shape.value_columns)
    # The queries that see one of these keys lie in as many blocks for each head.
    first = pl.program_id(0)
    end = pl.cdiv(jnp.minimum(keys.start + size + shape.window - 1, shape.length), size)

    def step(i: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
        head, queries = i // (end - first), shape.tokens(first + i % (end - first), size)
        q = _matrix(query, queries, shape.columns, head)
        g = _matrix(grad, queries, shape.value_columns, head)
        lines = load_line(denominators, queries, head), load_line(mean, queries, head)
        weights, dscores = _score_gradients(q, k, v, g, segments, *lines, queries, keys, shape)
        return (
            totals[0] + _product(dscores.astype(q.dtype), q, 0, 0),
            totals[1] + _product(weights.astype(g.dtype), g, 0, 0),
        )

    zeros = tuple(
        jnp.zeros((size, part.size), jnp.float32) for part in (shape.columns, shape.value_columns)
    )
    dk, dv = jax.lax.fori_loop(0, together * (end - first), step, zeros)
    store(dkey, dk, keys, shape.columns, between=(OWN,))
    store(dvalue, dv, keys, shape.value_columns, between=(OWN,))
