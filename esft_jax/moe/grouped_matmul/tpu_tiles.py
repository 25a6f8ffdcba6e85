"""Sizes of the blocks that the TPU kernels hold in a core's vector memory (VMEM), and their order.

Rows are cut into tiles, and a tile into up to four pieces: a group that covers a tile only in part
is charged for the pieces that it touches. Widths are chosen for the chip that the program is
compiled for, by the time that arithmetic and memory traffic would take one after the other.

Letters: G groups, M visits at most.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from esft_jax.ops.quantised import Quantised

PIECES = 4
# A group wastes one piece on average, half of it at either end: about an eighth of the work, if a
# piece is an eighth of the mean group. Smaller pieces would waste less arithmetic, but load a
# matrix into the matrix unit for fewer rows. Below 16 rows a bfloat16 register is not filled;
# above 64 nothing is gained, since tiles of 256 rows keep the unit busy.
PIECES_PER_GROUP, SMALLEST_PIECE, LARGEST_PIECE = 8, 16, 64
LANES = 128  # columns of a vector register
STEP_SECONDS = 0.35e-6  # what a step of a kernel's grid costs beside its work
MIB = 2**20


def piece_rows(rows: int, groups: int) -> int:
    """Rows multiplied at once, given the mean size of a group."""
    wanted = rows / groups / PIECES_PER_GROUP
    return 2 ** round(math.log2(min(LARGEST_PIECE, max(SMALLEST_PIECE, wanted))))


class Visits(NamedTuple):
    """What each step of a kernel works on: a row tile and a group with rows in it, in order.

    Attributes:
        group: the group.
        tile: the row tile.
        low, high: the group's rows, counted from the start of the tile.
        begin: first row of the pieces that they lie in.
        pieces: number of these pieces.
    """

    group: Int[Array, " M"]
    tile: Int[Array, " M"]
    low: Int[Array, " M"]
    high: Int[Array, " M"]
    begin: Int[Array, " M"]
    pieces: Int[Array, " M"]


def plan_visits(
    begins: Int[Array, " G"],
    sizes: Int[Array, " G"],
    rows: int,
    piece: int,
    *,
    visit_empty: bool = False,
) -> tuple[Visits, Int[Array, ""]]:
    """Visits of disjoint groups, and how many of them there are; the rest is undefined.

    Args:
        visit_empty: visit groups without rows too, once and without pieces.
    """
    tile, ends = PIECES * piece, begins + sizes
    first_tile = begins // tile
    per_group = jnp.where(sizes > 0, pl.cdiv(ends, tile) - first_tile, int(visit_empty))
    bounds = jnp.cumsum(per_group)
    index = jnp.arange(pl.cdiv(rows, tile) + len(sizes), dtype=jnp.int32)
    group = jnp.searchsorted(bounds, index, side="right", method="compare_all").astype(jnp.int32)
    group = jnp.minimum(group, len(sizes) - 1)
    tiles = first_tile[group] + index - (bounds - per_group)[group]
    tiles = jnp.minimum(tiles, pl.cdiv(rows, tile) - 1)
    low, high = (jnp.clip(ends[group] - tiles * tile, 0, tile) for ends in (begins, ends))
    begin = low // piece * piece
    pieces = jnp.where(high > low, pl.cdiv(high - begin, piece), 0)
    return Visits(group, tiles, low, high, begin, pieces), bounds[-1]


class Fetches(NamedTuple):
    """Which blocks each visit asks for: those that it needs, or those that are there already.

    Attributes:
        tile: the row tile.
        matrices: for each bank, which of its matrices.
    """

    tile: Int[Array, " M"]
    matrices: tuple[Int[Array, " M"], ...]


def plan_fetches(visits: Visits, ranges: Sequence[tuple[int, int]]) -> Fetches:
    """Fetches where visits to padding lie between others, and groups are in any order.

    Args:
        ranges: first group, and number of groups, of each bank.
    """

    def at_latest(values: Array, needed: Array) -> Array:
        """Of the latest visit that needs the operand; of the first one where none has yet."""
        index = jnp.arange(len(needed), dtype=jnp.int32)
        latest = jax.lax.cummax(jnp.where(needed, index, jnp.argmax(needed).astype(jnp.int32)))
        return values[latest]

    def matrices(begin: int, count: int) -> Array:
        place = visits.group - begin
        taken = at_latest(place, (place >= 0) & (place < count))
        return jnp.clip(taken, 0, count - 1)

    groups = sum(count for _, count in ranges)
    tile = at_latest(visits.tile, visits.group < groups)
    return Fetches(tile, tuple(matrices(*bank) for bank in ranges))


class Widths(NamedTuple):
    """Widths of the blocks of a group's matrix `[in, out]`."""

    inner: int
    outer: int


def vmem_limit() -> int:
    """Bytes of VMEM for a kernel: half of it, as XLA has uses of its own, but at least 16 MiB."""
    capacity = pltpu.get_tpu_info().vmem_capacity_bytes
    return min(capacity, max(16 * MIB, capacity // 2))


class Stored(NamedTuple):
    """How a bank's matrices lie in memory.

    Attributes:
        size: bytes of a number, of its share of a scale too.
        quantised: whether they must be dequantised; a block then holds all inputs of a matrix.
    """

    size: float
    quantised: bool

    @classmethod
    def of(cls, matrices: Array | Quantised) -> "Stored":
        """That of an array."""
        held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(matrices))
        return cls(held / matrices.size, isinstance(matrices, Quantised))


def multiply_widths(
    visits: int,
    groups: int,
    tile: int,
    in_width: int,
    out_width: int,
    dtype: DTypeLike,
    banks: Sequence[Stored],
    *,
    transposed: bool,
) -> Widths:
    """Blocks for rows times matrices, or times their transposes. The grid is (outer blocks, visits,
    inner blocks).
    """
    size, bank_sizes = jnp.dtype(dtype).itemsize, [bank.size for bank in banks]
    quantised = any(bank.quantised for bank in banks)

    def held(w: Widths) -> float:
        rows_in, matrix, rows_out = tile * w.inner, w.inner * w.outer, tile * w.outer
        # Operands and result in two buffers each: one in use, one in transfer.
        buffers = 2 * (rows_in * size + matrix * sum(bank_sizes) + rows_out * size)
        converted = matrix * size if min(bank_sizes) < size else 0
        # Numbers and repeated scales, in float32.
        converted += 2 * 4 * matrix if quantised else 0
        # In float32: the product, what it replaces, and the sums kept from block to block.
        return buffers + converted + 4 * rows_out * (3 if w.inner < in_width else 2)

    def seconds(w: Widths) -> float:
        # An uncut matrix stays for all visits of its group; a cut one is fetched at every visit.
        fetched = groups if w.inner == in_width else visits
        traffic = fetched * in_width * w.outer * max(bank_sizes)
        traffic += visits * tile * (in_width + w.outer) * size
        steps = visits * pl.cdiv(in_width, w.inner)
        passes = _per_core(pl.cdiv(out_width, w.outer))
        return passes * _seconds(visits * tile * in_width * w.outer, traffic, steps)

    if quantised:
        inner, outer = _cuts(in_width), _cuts(out_width)
        inner, outer = (inner, [out_width]) if transposed else ([in_width], outer)
    else:
        inner, outer = [w for w in _cuts(in_width) if in_width % w == 0], _cuts(out_width)
    return _fastest(inner, outer, held, seconds)


def gradient_widths(
    visits: int, groups: int, tile: int, in_width: int, out_width: int, dtype: DTypeLike
) -> Widths:
    """Blocks for the products over rows. The grid is (inner blocks, outer blocks, visits)."""
    size = jnp.dtype(dtype).itemsize

    def held(w: Widths) -> int:
        buffers = 2 * (tile * (w.inner + w.outer) * size + 4 * w.inner * w.outer)
        # In float32: the masked rows of both sides, one of them transposed, and the product.
        return buffers + 4 * tile * (2 * w.inner + w.outer) + 4 * w.inner * w.outer

    def seconds(w: Widths) -> float:
        work = visits * tile * w.inner * w.outer
        traffic = visits * tile * (w.inner + w.outer) * size + 4 * groups * w.inner * w.outer
        passes = _per_core(pl.cdiv(in_width, w.inner)) * pl.cdiv(out_width, w.outer)
        return passes * _seconds(work, traffic, visits)

    return _fastest(_cuts(in_width), _cuts(out_width), held, seconds)


def _cuts(width: int) -> list[int]:
    """Widths of blocks: all, or whole registers in about equal parts."""
    lanes = pl.cdiv(width, LANES)
    parts = {LANES * pl.cdiv(lanes, count) for count in range(2, lanes + 1)}
    return [width, *sorted(parts, reverse=True)]


def _per_core(blocks: int) -> int:
    """Blocks for one core. Two cores (v4, v5p) share the first axis of a kernel's grid."""
    return pl.cdiv(blocks, pltpu.get_tpu_info().num_cores)


def _seconds(multiply_adds: int, traffic: float, steps: int) -> float:
    chip = pltpu.get_tpu_info()
    arithmetic = 2 * multiply_adds / chip.bf16_ops_per_second
    return arithmetic + traffic / chip.mem_bw_bytes_per_second + steps * STEP_SECONDS


def _fastest(
    inner: list[int],
    outer: list[int],
    held: Callable[[Widths], float],
    seconds: Callable[[Widths], float],
) -> Widths:
    widths = [Widths(i, o) for i in inner for o in outer]
    fitting = [w for w in widths if held(w) <= vmem_limit()]
    if not fitting:
        raise ValueError(
            f"grouped_matmul: no tiles of a {inner[0]} x {outer[0]} matrix fit in the "
            f"{vmem_limit() / MIB:.0f} MiB of VMEM of {pltpu.get_tpu_info().chip_version}; "
            f"widths that are multiples of {LANES} can be cut smaller"
        )
    return min(fitting, key=seconds)
