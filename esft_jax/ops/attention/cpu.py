"""Attention on a CPU, by BLAS: queries, keys and values are read where they lie.

A foreign function (`ops/foreign.py`); it needs the `cpu` extra. The algorithm is that of `xla.py`,
with two savings: blocks of queries end with documents, and so meet only keys of their own; and
nothing is copied to bring heads together.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from esft_jax.ops import foreign
from esft_jax.ops.attention.operation import KEPT, sinks_gradient, sinks_or_default
from esft_jax.ops.foreign import (
    Matrix,
    address_of,
    clear,
    compiled,
    extent,
    integer,
    keep,
    multiply_matrices,
    operand,
    result,
    view,
)

BLOCK = 128  # queries per block, at most


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S G R"],
    value: Float[Array, "B S G W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H W"]:
    """As `operation.causal_attention`, which checks the shapes that addresses are made of.

    Raises:
        ValueError: a type other than float32.
    """
    for array in (query, key, value):
        if array.dtype != jnp.float32:
            raise ValueError(f"attention: 'cpu' takes float32, not {array.dtype}")
    foreign.register("esft_jax_attention", _blocks, _attend)
    foreign.register("esft_jax_attention_gradient", _key_heads, _gradient)
    window = window or query.shape[1]
    sinks = sinks_or_default(sinks, query.shape[2])
    segment_ids = segment_ids.astype(jnp.int32)
    return _causal_attention(scale, window, query, key, value, sinks, segment_ids)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _causal_attention(
    scale: float,
    window: int,
    query: Array,
    key: Array,
    value: Array,
    sinks: Array,
    segment_ids: Array,
) -> Float[Array, "B S H W"]:
    return _forward(scale, window, query, key, value, sinks, segment_ids)[0]


def _forward(
    scale: float,
    window: int,
    query: Array,
    key: Array,
    value: Array,
    sinks: Array,
    segment_ids: Array,
) -> tuple[Array, tuple]:
    batch, length, heads, _ = query.shape
    call = jax.ffi.ffi_call(
        "esft_jax_attention",
        (
            jax.ShapeDtypeStruct((batch, length, heads, value.shape[-1]), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, length), jnp.float32),
        ),
    )
    numbers = jnp.float32(scale), jnp.int32(window)
    mixed, denominators = (
        checkpoint_name(x, KEPT) for x in call(query, key, value, segment_ids, *numbers, sinks)
    )
    return mixed, (query, key, value, sinks, segment_ids, mixed, denominators)


def _backward(scale: float, window: int, residuals: tuple, grad: Float[Array, "B S H W"]) -> tuple:
    query, key, value, sinks, segment_ids, mixed, denominators = residuals
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (query, key, value)]
    call = jax.ffi.ffi_call("esft_jax_attention_gradient", shapes)
    numbers = jnp.float32(scale), jnp.int32(window)
    kept = mixed, denominators, grad
    dquery, dkey, dvalue = call(query, key, value, segment_ids, *numbers, *kept)
    mean = jnp.einsum("bshw,bshw->bhs", grad, mixed)
    return dquery, dkey, dvalue, sinks_gradient(sinks, denominators, mean), None


_causal_attention.defvjp(_forward, _backward)


# From here on, code for numba. A head's matrix in an array `[B, S, H, _]`, from a token on, has the
# width of all heads as its stride.


@compiled
def _matrix(array: foreign.Buffer, row: int, token: int, head: int) -> Matrix:
    length, heads, width = extent(array, 1), extent(array, 2), extent(array, 3)
    place = ((row * length + token) * heads + head) * width
    return Matrix(array.address + 4 * place, heads * width)


@compiled
def _key_head(query: foreign.Buffer, key: foreign.Buffer, head: int) -> int:
    """The head of keys and values that a head of queries meets."""
    return head // (extent(query, 2) // extent(key, 2))


@compiled
def _document(segments: np.ndarray, start: int, limit: int, window: int) -> tuple[int, int]:
    """The first token of the document of query `start` that it sees, and the end of the queries, at
    most `limit`, that follow it in the same document.
    """
    first, stop = max(0, start - window + 1), start + 1
    while segments[first] != segments[start]:
        first += 1
    while stop < limit and segments[stop] == segments[start]:
        stop += 1
    return first, stop


@compiled
def _number(frame: int, index: int) -> np.float32:
    return view(operand(frame, index).address, 1, np.float32)[0]


_LOG2_E = np.float32(1.4426950408889634)
# The natural logarithm of 2 in two parts, of which the first has few digits.
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SMALLEST = np.float32(-87)  # its exponential is nearly the smallest number
_HALF, _ONE, _ZERO = np.float32(0.5), np.float32(1), np.float32(0)
_C2, _C3, _C4, _C5, _C6, _C7 = (
    np.float32(c)
    for c in (
        5.0000001201e-1,
        1.6666665459e-1,
        4.1665795894e-2,
        8.3334519073e-3,
        1.3981999507e-3,
        1.9875691500e-4,
    )
)


@compiled
def _exponentials(
    scores: np.ndarray, top: float, segments: np.ndarray, own: int, powers: np.ndarray
) -> None:
    """Replace scores by the exponentials of what they are over `top`, or by 0 where the key is of
    another document.

    Written so that the loops become vector instructions (Cephes' polynomial, as in `expf`).
    """
    bits = powers.view(np.int32)
    for j in range(scores.size):
        over = scores[j] - top
        x = min(max(over, _SMALLEST), _ZERO)
        n = np.floor(x * _LOG2_E + _HALF)
        r = x - n * _LN2_HIGH - n * _LN2_LOW
        series = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2
        # The last difference is 0, or what is not a number stays so.
        power = series * r * r + r + _ONE + (over - over)
        scores[j] = power if segments[j] == own else _ZERO
        bits[j] = (np.int32(n) + np.int32(127)) << np.int32(23)
    for j in range(scores.size):
        scores[j] *= powers[j]


@compiled
def _sum(values: np.ndarray) -> np.float32:
    """By eight sums that do not wait for each other."""
    a = b = c = d = e = f = g = h = _ZERO
    whole = values.size // 8 * 8
    for j in range(0, whole, 8):
        a += values[j]
        b += values[j + 1]
        c += values[j + 2]
        d += values[j + 3]
        e += values[j + 4]
        f += values[j + 5]
        g += values[j + 6]
        h += values[j + 7]
    for j in range(whole, values.size):
        a += values[j]
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


@compiled
def _blocks(frame: int) -> int:
    query = operand(frame, 0)
    return extent(query, 0) * extent(query, 2) * -(-extent(query, 1) // BLOCK)


@compiled
def _attend(frame: int, index: int) -> None:
    query = operand(frame, 0)
    length, heads = extent(query, 1), extent(query, 2)
    blocks = -(-length // BLOCK)
    row, head, start = index // blocks // heads, index // blocks % heads, index % blocks * BLOCK
    limit = min(start + BLOCK, length)
    segments = view(operand(frame, 3).address + 4 * row * length, length, np.int32)
    while start < limit:
        first, stop = _document(segments, start, limit, integer(operand(frame, 5), 0))
        _attend_to(frame, row, head, first, start, stop)
        start = stop


@compiled
def _attend_to(frame: int, row: int, head: int, first: int, start: int, stop: int) -> None:
    """Queries `start` to `stop` of one document; the first key that one of them sees is `first`."""
    query, key, value = operand(frame, 0), operand(frame, 1), operand(frame, 2)
    mixed, denominators = result(frame, 0), result(frame, 1)
    length, heads = extent(query, 1), extent(query, 2)
    segments = view(operand(frame, 3).address + 4 * row * length, length, np.int32)
    width, window = stop - first, integer(operand(frame, 5), 0)
    sink = view(operand(frame, 6).address, heads, np.float32)[head]
    scores, powers = np.empty((stop - start, width), np.float32), np.empty(width, np.float32)
    weights = Matrix(address_of(scores), width)
    key_head = _key_head(query, key, head)
    q, k = _matrix(query, row, start, head), _matrix(key, row, first, key_head)
    rows, inner, outer = stop - start, extent(query, 3), extent(value, 3)
    multiply_matrices(q, k, weights, rows, width, inner, False, True, _number(frame, 4), _ZERO)
    totals = np.empty(stop - start, np.float32)
    logs = view(denominators.address + 4 * (row * heads + head) * length, length, np.float32)
    for i in range(start, stop):
        oldest = max(first, i + 1 - window)
        seen = scores[i - start, oldest - first : i + 1 - first]
        documents = segments[oldest : i + 1]
        top = max(seen[-1], sink)  # a token sees itself
        for j in range(seen.size):
            if documents[j] == segments[i]:
                top = max(top, seen[j])
        _exponentials(seen, top, documents, segments[i], powers)
        total = _sum(seen) + np.exp(sink - top)
        _clear_around(scores[i - start], oldest - first, i + 1 - first)
        totals[i - start] = total
        logs[i] = top + np.log(total)
    out = _matrix(mixed, row, start, head)
    v = _matrix(value, row, first, key_head)
    multiply_matrices(weights, v, out, rows, outer, width, False, False, _ONE, _ZERO)
    for i in range(rows):
        values = view(out.address + 4 * i * out.stride, outer, np.float32)
        for j in range(values.size):
            values[j] /= totals[i]
    keep(scores)


@compiled
def _clear_around(row: np.ndarray, start: int, stop: int) -> None:
    """Keep the numbers from `start` to `stop` only."""
    # Loops that begin at 0 become vector instructions.
    for part in (row[:start], row[stop:]):
        for j in range(part.size):
            part[j] = 0


@compiled
def _key_heads(frame: int) -> int:
    key = operand(frame, 1)
    return extent(key, 0) * extent(key, 2)


@compiled
def _clear(matrix: Matrix, rows: int, columns: int) -> None:
    for i in range(rows):
        clear(matrix.address + 4 * i * matrix.stride, 4 * columns)


@compiled
def _add_gradient(frame: int, row: int, head: int, key_head: int) -> None:
    """Of one head of queries in one row, block by block."""
    query, key, value = operand(frame, 0), operand(frame, 1), operand(frame, 2)
    mixed, denominators, grad = operand(frame, 6), operand(frame, 7), operand(frame, 8)
    scale, window = _number(frame, 4), integer(operand(frame, 5), 0)
    dquery, dkey, dvalue = result(frame, 0), result(frame, 1), result(frame, 2)
    length, heads = extent(query, 1), extent(query, 2)
    inner, outer = extent(query, 3), extent(value, 3)
    segments = view(operand(frame, 3).address + 4 * row * length, length, np.int32)
    begin = 4 * (row * heads + head) * length
    logs = view(denominators.address + begin, length, np.float32)
    start = 0
    while start < length:
        limit = min((start // BLOCK + 1) * BLOCK, length)
        first, stop = _document(segments, start, limit, window)
        rows, width = stop - start, stop - first
        scores, dscores = np.empty((rows, width), np.float32), np.empty((rows, width), np.float32)
        powers = np.empty(width, np.float32)
        weights, dweights = Matrix(address_of(scores), width), Matrix(address_of(dscores), width)
        q, k = _matrix(query, row, start, head), _matrix(key, row, first, key_head)
        g, v = _matrix(grad, row, start, head), _matrix(value, row, first, key_head)
        multiply_matrices(q, k, weights, rows, width, inner, False, True, scale, _ZERO)
        multiply_matrices(g, v, dweights, rows, width, outer, False, True, _ONE, _ZERO)
        out = _matrix(mixed, row, start, head)
        for i in range(rows):
            own, end = segments[start + i], start + i + 1
            oldest = max(first, end - window)
            seen = scores[i, oldest - first : end - first]
            dseen = dscores[i, oldest - first : end - first]
            _exponentials(seen, logs[start + i], segments[oldest:end], own, powers)
            # What the softmax takes off every score's gradient: sum_s weight_s * (grad . value_s).
            ours = view(out.address + 4 * i * out.stride, outer, np.float32)
            theirs = view(g.address + 4 * i * g.stride, outer, np.float32)
            mean = _ZERO
            for j in range(outer):
                mean += ours[j] * theirs[j]
            for j in range(seen.size):
                dseen[j] = seen[j] * (dseen[j] - mean) * scale
            for weight in (scores[i], dscores[i]):
                _clear_around(weight, oldest - first, end - first)
        dq, dk = _matrix(dquery, row, start, head), _matrix(dkey, row, first, key_head)
        dv = _matrix(dvalue, row, first, key_head)
        multiply_matrices(dweights, k, dq, rows, inner, width, False, False, _ONE, _ZERO)
        multiply_matrices(dweights, q, dk, width, inner, rows, True, False, _ONE, _ONE)
        multiply_matrices(weights, g, dv, width, outer, rows, True, False, _ONE, _ONE)
        keep(scores, dscores)
        start = stop


@compiled
def _gradient(frame: int, index: int) -> None:
    """Of one head of keys and values in one row, and of the query heads that meet it.

    They add to what its keys and values get, one after the other.
    """
    query, key, value = operand(frame, 0), operand(frame, 1), operand(frame, 2)
    dkey, dvalue = result(frame, 1), result(frame, 2)
    key_heads, together = extent(key, 2), extent(query, 2) // extent(key, 2)
    row, key_head = index // key_heads, index % key_heads
    _clear(_matrix(dkey, row, 0, key_head), extent(key, 1), extent(key, 3))
    _clear(_matrix(dvalue, row, 0, key_head), extent(value, 1), extent(value, 3))
    for head in range(key_head * together, (key_head + 1) * together):
        _add_gradient(frame, row, head, key_head)
