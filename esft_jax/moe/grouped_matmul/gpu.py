"""Grouped products on GPUs: Pallas kernels compiled by Triton.

`jax.lax.ragged_dot` expands on GPUs: every row is copied once for every group. The kernels here
read each bank where it lies. A program computes one tile of the result. A small schedule tells it
its rows and their group, so groups need no alignment and no padding, and empty ones cost nothing.
On CPU the same kernels run in Pallas' interpreter, for tests.

Letters: N rows, G groups, C and O the sides of a matrix as it is multiplied, D and F as it lies.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.moe.grouped_matmul.groups import Groups
from esft_jax.ops.platform import block_shared_memory
from esft_jax.ops.quantised import Quantised, numbers, per_byte
from esft_jax.ops.triton_tiles import Part, load, load_line, store


class Tiles(NamedTuple):
    """How a result is cut into tiles, one for each program.

    Attributes:
        rows, columns: shape of a tile.
        step: length of the pieces in which its sums are made.
        panel: columns are visited in panels of at most this many tiles, all rows of a panel before
            the next panel: programs that run together then share rows and matrices in the cache.
        warps, stages: of 32 threads that work on a tile; of loads under way at once.
    """

    rows: int
    columns: int
    step: int
    panel: int
    warps: int
    stages: int

    def bytes(self, dtype: jnp.dtype) -> int:
        """Of shared memory, for all loads under way."""
        return self.stages * self.step * (self.rows + self.columns) * dtype.itemsize

    @property
    def compiler_params(self) -> triton.CompilerParams:
        """The last two, as Pallas takes them."""
        return triton.CompilerParams(num_warps=self.warps, num_stages=self.stages)


# For tests: with many small tiles they reach every edge of the kernels at small sizes.
_INTERPRETED = Tiles(rows=16, columns=16, step=8, panel=1, warps=1, stages=1)


def _compiled(dtype: jnp.dtype) -> Tiles:
    """What suits the GPU compiled for."""
    tile = Tiles(rows=128, columns=128, step=128 // dtype.itemsize, panel=16, warps=8, stages=3)
    wide = tile._replace(columns=256)
    return wide if dtype.itemsize == 2 and wide.bytes(dtype) <= block_shared_memory() else tile


def multiply(
    x: Float[Array, "N C"],
    banks: tuple[Bank, ...],
    groups: Groups,
    *,
    transposed: bool,
) -> Float[Array, "N O"]:
    """As `xla.multiply`."""

    def run(x: Array, groups: Groups, *banks: Bank, tile: Tiles, interpret: bool = False) -> Array:
        rows, width = x.shape[0], banks[0].width(transposed=transposed)
        schedule = _schedule(groups, rows, tile.rows)
        columns = pl.cdiv(width, tile.columns)
        panels = pl.cdiv(columns, tile.panel)
        return pl.pallas_call(
            partial(_multiply_kernel, counts=[*map(len, banks)], tile=tile, transposed=transposed),
            out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
            # Programs that are neighbours along the first axis run together.
            grid=(pl.cdiv(columns, panels), schedule.shape[1], panels),
            compiler_params=tile.compiler_params,
            interpret=interpret,
            name="grouped_matmul",
        )(schedule, jnp.stack([b.first for b in banks]), x, *(b.matrices for b in banks))

    return _on_platform(run, x, groups, *banks)


def weight_gradient(
    x: Float[Array, "N D"],
    grad: Float[Array, "N F"],
    groups: Groups,
    first: int,
    count: int,
) -> Float[Array, "count D F"]:
    """As `xla.weight_gradient`."""

    def run(
        x: Array, grad: Array, groups: Groups, *, tile: Tiles, interpret: bool = False
    ) -> Array:
        depth, width = x.shape[1], grad.shape[1]
        ends = groups.ends
        limits = jnp.stack([ends - groups.sizes, ends])[:, first : first + count]
        return pl.pallas_call(
            partial(_weight_gradient_kernel, tile=tile),
            out_shape=jax.ShapeDtypeStruct((count, depth, width), jnp.float32),
            grid=(pl.cdiv(width, tile.columns), pl.cdiv(depth, tile.rows), count),
            compiler_params=tile.compiler_params,
            interpret=interpret,
            name="grouped_weight_gradient",
        )(limits.astype(jnp.int32), x, grad)

    return _on_platform(run, x, grad, groups)


def _on_platform(run: Callable[..., Array], x: Array, *args: Array | Bank | Groups) -> Array:
    """Decided while the program is lowered: it may be compiled for a device that is not here."""
    return jax.lax.platform_dependent(
        x,
        *args,
        cpu=partial(run, tile=_INTERPRETED, interpret=True),
        default=partial(run, tile=_compiled(x.dtype)),
    )


def _schedule(groups: Groups, rows: int, block: int) -> Int[Array, "3 M"]:
    """Group, first row and end of rows of every block of rows.

    Padding rows are group G. Blocks of group G + 1 do not exist: there is room for the most blocks
    that any groups need.
    """
    sizes, ends, of_group = groups.stretches(rows)
    blocks = (sizes + block - 1) // block
    block_ends = jnp.cumsum(blocks)
    most = min(rows, rows // block + len(sizes))  # of a bank of many adapters, few groups have rows
    index = jnp.arange(most, dtype=jnp.int32)
    stretch = jnp.searchsorted(block_ends, index, side="right", method="compare_all")
    start = (ends - sizes)[stretch] + (index - (block_ends - blocks)[stretch]) * block
    group = stretch.astype(jnp.int32)
    if of_group is not None:
        group = jnp.append(of_group, len(groups.sizes) + 1)[stretch]
    return jnp.stack([group, start, ends[stretch]])


def _multiply_kernel(
    schedule: jax.Ref,
    firsts: jax.Ref,
    x: jax.Ref,
    *banks_and_out: Any,
    counts: list[int],
    tile: Tiles,
    transposed: bool,
) -> None:
    *banks, out = banks_and_out
    group, start, end = (schedule[i, pl.program_id(1)] for i in range(3))
    column = pl.program_id(2) * pl.num_programs(0) + pl.program_id(0)
    rows = Part(start, tile.rows, end)
    columns = Part(column * tile.columns, tile.columns, out.shape[1])
    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    exists = columns.start < out.shape[1]

    def multiply_by(bank: jax.Ref | Quantised, matrix: Array) -> None:
        if isinstance(bank, Quantised):
            multiply = _times_transpose if transposed else _times_quantised
            multiply(x, bank, matrix, out, rows, column, tile)
            return

        def step(i: Array, total: Array) -> Array:
            inner = Part(i * tile.step, tile.step, x.shape[1])
            left = load(x, rows, inner)
            right = load(bank, *((columns, inner) if transposed else (inner, columns)), matrix)
            return total + _product(left, right.astype(left.dtype), transposed)

        store(out, jax.lax.fori_loop(0, pl.cdiv(x.shape[1], tile.step), step, total), rows, columns)

    begin = 0
    for i, (bank, count) in enumerate(zip(banks, counts, strict=True)):

        @pl.when(exists & (group >= begin) & (group < begin + count))
        def _(i: int = i, bank: jax.Ref | Quantised = bank, begin: int = begin) -> None:
            multiply_by(bank, firsts[i] + group - begin)

        begin += count

    @pl.when(exists & (group == begin))
    def _() -> None:
        store(out, total, rows, columns)


def _product(left: Array, right: Array, transposed: bool) -> Array:
    return jax.lax.dot_general(
        left,
        right,
        (((1,), (1 if transposed else 0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def _times_quantised(
    x: jax.Ref,
    bank: Any,
    matrix: Array,
    out: jax.Ref,
    rows: Part,
    column: Array,
    tile: Tiles,
) -> None:
    """A tile of rows times a quantised matrix. A step stays within a group of each half."""
    inputs, stored = x.shape[1], bank.codes.shape[-2]
    size = math.gcd(tile.step, bank.group_size, stored)
    columns = Part(column * tile.columns, tile.columns, out.shape[1])

    def step(i: Array, total: Array) -> Array:
        codes = load(bank.codes, Part(i * size, size, stored), columns, matrix)
        for half, values in enumerate(numbers(codes, bank.scheme)):
            start = half * stored + i * size
            left = load(x, rows, Part(start, size, inputs))
            scale = load_line(bank.scales, columns, matrix, start // bank.group_size)
            right = (values * scale.astype(jnp.float32)[None]).astype(left.dtype)
            total += _product(left, right, transposed=False)
        return total

    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    store(out, jax.lax.fori_loop(0, stored // size, step, total), rows, columns)


def _times_transpose(
    x: jax.Ref,
    bank: Any,
    matrix: Array,
    out: jax.Ref,
    rows: Part,
    column: Array,
    tile: Tiles,
) -> None:
    """The same with its transpose: columns of the result are inputs of the matrix, as many of each
    half as codes hold, in parts that have one scale each.
    """
    stored, halves = bank.codes.shape[-2], per_byte(bank.scheme)
    held = tile.columns // halves
    size = math.gcd(held, bank.group_size, stored)
    # Where programs hold more than there is, the parts behind the end must be masked.
    ends: list[Any] = [half * stored for half in (1, 2)]
    if stored % held:
        ends = [np.int32(end) for end in ends]
    parts = [
        (half, Part(column * held + place, size, ends[0]))
        for half in range(halves)
        for place in range(0, held, size)
    ]

    def step(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
        inner = Part(i * tile.step, tile.step, x.shape[1])
        left, sums = load(x, rows, inner), []
        for (half, part), total in zip(parts, totals, strict=True):
            codes = load(bank.codes, part, inner, matrix)
            group = jnp.minimum((half * stored + part.start) // bank.group_size, groups - 1)
            scale = load_line(bank.scales, inner, matrix, group).astype(jnp.float32)
            right = numbers(codes, bank.scheme)[half] * scale[None]
            sums.append(total + _product(left, right.astype(left.dtype), transposed=True))
        return tuple(sums)

    groups = bank.scales.shape[-2]
    totals = tuple(jnp.zeros((tile.rows, size), jnp.float32) for _ in parts)
    totals = jax.lax.fori_loop(0, pl.cdiv(x.shape[1], tile.step), step, totals)
    for (half, part), total in zip(parts, totals, strict=True):
        columns = Part(half * stored + part.start, size, ends[half])
        store(out, total, rows, columns)


def _weight_gradient_kernel(
    limits: jax.Ref, x: jax.Ref, grad: jax.Ref, out: jax.Ref, *, tile: Tiles
) -> None:
    column, row, group = (pl.program_id(axis) for axis in range(3))
    start, end = limits[0, group], limits[1, group]
    of_x = Part(row * tile.rows, tile.rows, x.shape[1])
    of_grad = Part(column * tile.columns, tile.columns, grad.shape[1])

    def step(i: Array, total: Array) -> Array:
        rows = Part(start + i * tile.step, tile.step, end)
        # Rows of other groups are 0 on both sides: an infinity times 0 would be NaN.
        return total + jax.lax.dot_general(
            load(x, rows, of_x),
            load(grad, rows, of_grad),
            (((0,), (0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )

    total = jnp.zeros((tile.rows, tile.columns), jnp.float32)
    total = jax.lax.fori_loop(0, pl.cdiv(end - start, tile.step), step, total)
    store(out, total, of_x, of_grad, group)
