"""Grouped products on a CPU, by BLAS: rows and matrices are read where they lie.

XLA can multiply only what it has cut out, and only row counts that are known when it compiles. So
this is a foreign function (`ops/foreign.py`); it needs the `cpu` extra.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.moe.grouped_matmul.groups import Groups
from esft_jax.ops import foreign
from esft_jax.ops.foreign import (
    BFLOAT16,
    Buffer,
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
from esft_jax.ops.quantisation import Scheme
from esft_jax.ops.quantised import Quantised

# At most so many rows and columns of a result are one task of a thread.
ROWS, GRADIENT_ROWS, COLUMNS = 256, 512, 1024

_SCHEMES: tuple[Scheme, ...] = ("int8", "int4", "fp8", "mxfp4")
_INT8, _INT4, _FP8 = 0, 1, 2
_FP8_STEP = np.float32(2.0**-9)  # all numbers of fp8 are multiples of it


def multiply(
    x: Float[Array, "N C"],
    banks: tuple[Bank, ...],
    groups: Groups,
    *,
    transposed: bool,
) -> Float[Array, "N O"]:
    """See `xla.multiply`. Addresses follow from shapes and groups, which `operation.py` checks."""
    foreign.register("esft_jax_multiply", _multiply_tasks, _multiply)
    out = jax.ShapeDtypeStruct((len(x), banks[0].width(transposed=transposed)), x.dtype)
    firsts = jnp.stack([bank.first for bank in banks])
    counts = jnp.array([len(bank) for bank in banks], jnp.int32)
    call = jax.ffi.ffi_call("esft_jax_multiply", out)
    starts = _if_any(groups.starts), _if_any(groups.order)
    stored = [array for bank in banks for array in _stored(bank)]
    return call(x, groups.sizes, *starts, firsts, counts, jnp.int32(transposed), *stored)


def _stored(bank: Bank) -> tuple[Array, Array, Array]:
    """Matrices or codes, scales if there are any, and the place of their scheme in `_SCHEMES` with
    the size of groups.
    """
    matrices = bank.matrices
    if isinstance(matrices, Quantised):
        scheme = _SCHEMES.index(matrices.scheme)
        kind = jnp.array([scheme, matrices.group_size], jnp.int32)
        return matrices.codes, matrices.scales, kind
    return matrices, jnp.zeros((0, 0, 0)), jnp.array([-1, 0], jnp.int32)


def weight_gradient(
    x: Float[Array, "N D"],
    grad: Float[Array, "N F"],
    groups: Groups,
    first: int,
    count: int,
) -> Float[Array, "count D F"]:
    """See `xla.weight_gradient`."""
    foreign.register("esft_jax_weight_gradient", _gradient_tasks, _gradient)
    out = jax.ShapeDtypeStruct((count, x.shape[1], grad.shape[1]), jnp.float32)
    call = jax.ffi.ffi_call("esft_jax_weight_gradient", out)
    return call(x, grad, groups.sizes, _if_any(groups.starts), jnp.int32(first))


def _if_any(numbers: Int[Array, " G"] | None) -> Int[Array, " _"]:
    """An operand, without numbers where there are none."""
    return jnp.zeros(0, jnp.int32) if numbers is None else numbers


@compiled
def _pieces(total: int, size: int) -> int:
    return -(-total // size)


@compiled
def _read(buffer: Buffer, first: int, rows: int, columns: int, stride: int) -> tuple:
    """A part of a buffer in float32, from its number `first` on, and what must be kept meanwhile.

    What is bfloat16 is copied.
    """
    if buffer.dtype != BFLOAT16:
        return Matrix(buffer.address + 4 * first, stride), np.empty(0, np.uint32)
    wide = np.empty(rows * columns, np.uint32)
    narrow = view(buffer.address + 2 * first, (rows - 1) * stride + columns, np.uint16)
    for row in range(rows):
        for column in range(columns):
            wide[row * columns + column] = np.uint32(narrow[row * stride + column]) << np.uint32(16)
    return Matrix(address_of(wide), columns), wide


@compiled
def _dequantise(
    codes: Buffer,
    scales: Buffer,
    kind: Buffer,
    place: int,
    row: int,
    rows: int,
    column: int,
    columns: int,
) -> tuple:
    """Rows and columns of a quantised matrix in float32, from `row` and `column` on."""
    scheme, size = integer(kind, 0), integer(kind, 1)
    stored, groups, width = extent(codes, 1), extent(scales, 1), extent(codes, 2)
    values, scale = np.empty(rows * columns, np.float32), np.empty(columns, np.float32)
    group = -1
    for i in range(rows):
        target, at = i * columns, row + i
        if at // size != group:
            group = at // size
            first = (place * groups + group) * width + column
            wide, kept = _read(scales, first, 1, columns, columns)
            taken = view(wide.address, columns, np.float32)
            for j in range(columns):
                scale[j] = taken[j]
            keep(kept)
        upper = at >= stored
        first = codes.address + (place * stored + at - (stored if upper else 0)) * width + column
        if scheme == _INT8:
            whole = view(first, columns, np.int8)
            for j in range(columns):
                values[target + j] = np.float32(whole[j]) * scale[j]
            continue
        packed, shift = view(first, columns, np.uint8), np.int32(4 if upper else 0)
        if scheme == _INT4:
            for j in range(columns):
                number = (np.int32(packed[j]) >> shift) & np.int32(15)
                values[target + j] = np.float32((number ^ np.int32(8)) - np.int32(8)) * scale[j]
            continue
        # See `ops.quantised.numbers`.
        if scheme == _FP8:
            for j in range(columns):
                code = np.int32(packed[j])
                power, fraction = (code >> 3) & np.int32(15), code & np.int32(7)
                wider = max(power - np.int32(1), np.int32(0))
                steps = (np.int32(8) + fraction) << wider if power > 0 else fraction
                value = np.float32(steps) * _FP8_STEP
                values[target + j] = (-value if code > 127 else value) * scale[j]
            continue
        for j in range(columns):
            number = (np.int32(packed[j]) >> shift) & np.int32(15)
            exponent, mantissa = (number >> 1) & np.int32(3), number & np.int32(1)
            above = max(exponent - np.int32(1), np.int32(0))
            doubled = (np.int32(2) + mantissa) << above if exponent > 0 else mantissa
            half = scale[j] * np.float32(0.5)
            values[target + j] = np.float32(-doubled if number > 7 else doubled) * half
    keep(scale)
    return Matrix(address_of(values), columns), values


@compiled
def _round(product: np.ndarray, out: Buffer, first: int, columns: int, stride: int) -> None:
    """Write float32 rows as bfloat16 ones, to the nearest, ties to even."""
    bits = product.view(np.uint32)
    rows = product.size // columns
    narrow = view(out.address + 2 * first, (rows - 1) * stride + columns, np.uint16)
    for i in range(product.size):
        upper = bits[i] >> np.uint32(16)
        if product[i] != product[i]:
            rounded = upper | np.uint32(0x40)
        else:
            rounded = (bits[i] + np.uint32(0x7FFF) + (upper & np.uint32(1))) >> np.uint32(16)
        narrow[i // columns * stride + i % columns] = rounded


@compiled
def _multiply_tasks(frame: int) -> int:
    sizes, outer = operand(frame, 1), extent(result(frame, 0), 1)
    total = 0
    for group in range(extent(sizes, 0)):
        total += _pieces(integer(sizes, group), ROWS)
    return total * _pieces(outer, COLUMNS) + 1


@compiled
def _multiply(frame: int, index: int) -> None:
    x, sizes = operand(frame, 0), operand(frame, 1)
    starts, order = operand(frame, 2), operand(frame, 3)
    firsts, counts = operand(frame, 4), operand(frame, 5)
    turned = integer(operand(frame, 6), 0) != 0
    out = result(frame, 0)
    rows, inner, outer = extent(x, 0), extent(x, 1), extent(out, 1)
    # The task's column, and its piece among those of all groups.
    across = _pieces(outer, COLUMNS)
    piece, column = index // across, index % across * COLUMNS
    columns = min(COLUMNS, outer - column)
    begin = group = 0
    for bank in range(extent(firsts, 0)):
        matrices, scales = operand(frame, 7 + 3 * bank), operand(frame, 8 + 3 * bank)
        kind = operand(frame, 9 + 3 * bank)
        for place in range(integer(counts, bank)):
            size = integer(sizes, group)
            here = _pieces(size, ROWS)
            if piece < here:
                if extent(starts, 0) > 0:
                    begin = integer(starts, group)
                begin += piece * ROWS
                length = min(ROWS, size - piece * ROWS)
                index_in_bank = integer(firsts, bank) + place
                if integer(kind, 0) >= 0:
                    matrix, kept_values = _dequantise(
                        matrices,
                        scales,
                        kind,
                        index_in_bank,
                        column if turned else 0,
                        columns if turned else inner,
                        0 if turned else column,
                        inner if turned else columns,
                    )
                    kept = np.empty(0, np.uint32)
                else:
                    first = index_in_bank * inner * outer
                    first += column * (inner if turned else 1)
                    matrix, kept = _read(
                        matrices,
                        first,
                        columns if turned else inner,
                        inner if turned else columns,
                        inner if turned else outer,
                    )
                    kept_values = np.empty(0, np.float32)
                taken, kept_rows = _read(x, begin * inner, length, inner, inner)
                target = begin * outer + column
                narrow = out.dtype == BFLOAT16
                product = np.empty(length * columns if narrow else 0, np.float32)
                if narrow:
                    wide = Matrix(address_of(product), columns)
                else:
                    wide = Matrix(out.address + 4 * target, outer)
                multiply_matrices(taken, matrix, wide, length, columns, inner, False, turned)
                if narrow:
                    _round(product, out, target, columns, outer)
                keep(kept, kept_rows, product)
                keep(kept_values)
                return
            piece -= here
            begin += size
            group += 1
    # The last task: padding rows, which lie between groups if these have starts.
    width = (2 if out.dtype == BFLOAT16 else 4) * outer
    padding = begin if extent(starts, 0) == 0 else 0
    for i in range(extent(order, 0)):
        group = integer(order, i)
        if integer(sizes, group) > 0:
            begin = integer(starts, group)
            clear(out.address + width * padding, width * (begin - padding))
            padding = begin + integer(sizes, group)
    clear(out.address + width * padding, width * (rows - padding))


@compiled
def _gradient_tasks(frame: int) -> int:
    out = result(frame, 0)
    down = _pieces(extent(out, 1), GRADIENT_ROWS)
    return extent(out, 0) * down * _pieces(extent(out, 2), COLUMNS)


@compiled
def _gradient(frame: int, index: int) -> None:
    x, grad = operand(frame, 0), operand(frame, 1)
    sizes, starts = operand(frame, 2), operand(frame, 3)
    out = result(frame, 0)
    inner, outer = extent(out, 1), extent(out, 2)
    down, across = _pieces(inner, GRADIENT_ROWS), _pieces(outer, COLUMNS)
    # Tasks that run side by side have rows of their own: at the edge of a column two threads would
    # write to the same new page of memory, and both clear it.
    place, row = index // (down * across), index % down * GRADIENT_ROWS
    column = index // down % across * COLUMNS
    rows, columns = min(GRADIENT_ROWS, inner - row), min(COLUMNS, outer - column)
    group = integer(operand(frame, 4), 0) + place
    begin = 0
    if extent(starts, 0) > 0:
        begin = integer(starts, group)
    else:
        for before in range(group):
            begin += integer(sizes, before)
    length = integer(sizes, group)
    target = Matrix(out.address + 4 * ((place * inner + row) * outer + column), outer)
    if length == 0:
        for i in range(rows):
            clear(target.address + 4 * i * outer, 4 * columns)
        return
    left, kept_left = _read(x, begin * inner + row, length, rows, inner)
    right, kept_right = _read(grad, begin * outer + column, length, columns, outer)
    multiply_matrices(left, right, target, rows, columns, length, True, False)
    keep(kept_left, kept_right)
