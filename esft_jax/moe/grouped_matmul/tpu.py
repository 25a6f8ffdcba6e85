"""Grouped products as Pallas kernels for TPU.

The kernels that come with JAX (`jax.experimental.pallas.ops.tpu.megablox`) fall short here: with
them a second bank, and zeros for the padding rows, are further passes over the whole result, and
every row tile that a group touches is multiplied whole, which is a third more work at the 384 rows
that an expert of DeepSeek-V2-Lite gets from a sequence of 4096 tokens.

Here one call walks over visits: pairs of a row tile and a group with rows in it, in order
(`tpu_tiles.py`). The padding rows are one more group, whose visits store zeros. A visit multiplies
the pieces of its tile that the group's rows lie in. Every bank is an operand of its own; one that a
visit does not need keeps the block it has, so nothing is fetched for it.

Letters: N rows, G groups, C and O the sides of a matrix as it is multiplied, D and F as it lies.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.moe.grouped_matmul.groups import Groups
from esft_jax.moe.grouped_matmul.tpu_tiles import (
    PIECES,
    Fetches,
    Stored,
    gradient_widths,
    multiply_widths,
    piece_rows,
    plan_fetches,
    plan_visits,
    vmem_limit,
)
from esft_jax.ops.quantised import Quantised

# What kernels and their index maps get: `Visits`, and `Fetches` or an array, with references in the
# place of arrays.
VisitRefs = Any
FetchRefs = Any


def multiply(
    x: Float[Array, "N C"],
    banks: tuple[Bank, ...],
    groups: Groups,
    *,
    transposed: bool,
) -> Float[Array, "N O"]:
    """As `xla.multiply`."""
    own_rows, piece = len(x), piece_rows(len(x), len(groups.sizes))
    x = _pad_to_tile(x, piece)
    (rows, in_width), tile, nobody = x.shape, PIECES * piece, len(groups.sizes)
    out_width = banks[0].width(transposed=transposed)
    begins = np.cumsum([0, *map(len, banks)])[:-1].tolist()
    ranges = [(begin, len(bank)) for begin, bank in zip(begins, banks, strict=True)]
    sizes, ends, of_group = groups.stretches(rows)
    visits, num_visits = plan_visits(ends - sizes, sizes, rows, piece)
    fetched: Fetches | Array
    if of_group is None:
        fetched = jnp.maximum(groups.sizes.sum() - 1, 0)[None] // tile
    else:
        visits = visits._replace(group=of_group[visits.group])
        fetched = plan_fetches(visits, ranges)
    firsts = jnp.stack([bank.first for bank in banks])
    inner, outer = multiply_widths(
        pl.cdiv(rows, tile) + nobody + 1,
        nobody,
        tile,
        in_width,
        out_width,
        x.dtype,
        [Stored.of(bank.matrices) for bank in banks],
        transposed=transposed,
    )
    parts = pl.cdiv(in_width, inner)

    # A visit that has no use for an operand asks for the block that is there already or is needed
    # next, which costs no transfer. Groups in order need only the last tile that any of them has.
    def rows_block(
        o: Array, v: Array, c: Array, visits: VisitRefs, fetched: FetchRefs, _: jax.Ref
    ) -> tuple:
        c = jnp.where(visits.group[v] == nobody, parts - 1, c)
        if isinstance(fetched, Fetches):
            return fetched.tile[v], c
        return jnp.minimum(visits.tile[v], fetched[0]), c

    def bank_block(
        bank: int,
        o: Array,
        v: Array,
        c: Array,
        visits: VisitRefs,
        fetched: FetchRefs,
        firsts: jax.Ref,
    ) -> tuple:
        begin, count = ranges[bank]
        row = visits.group[v] - begin
        if isinstance(fetched, Fetches):
            c = jnp.where((row >= 0) & (row < count), c, parts - 1)
            row = fetched.matrices[bank][v]
        else:
            c = jnp.where(row < 0, 0, jnp.where(row < count, c, parts - 1))
            row = jnp.clip(row, 0, count - 1)
        return firsts[bank] + row, *((o, c) if transposed else (c, o))

    depth, width = (outer, inner) if transposed else (inner, outer)

    def bank_specs(i: int, bank: Bank) -> Any:
        # Of quantised matrices a block holds all inputs, so codes and scales have the same place.
        return jax.tree.map(
            lambda leaf: pl.BlockSpec(
                (None, leaf.shape[1] if isinstance(bank.matrices, Quantised) else depth, width),
                partial(bank_block, i),
            ),
            bank.matrices,
        )

    out = pl.pallas_call(
        partial(
            _multiply_kernel,
            ranges=ranges,
            nobody=nobody,
            piece=piece,
            transposed=transposed,
            last=in_width - (parts - 1) * inner,
        ),
        out_shape=jax.ShapeDtypeStruct((rows, out_width), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(pl.cdiv(out_width, outer), num_visits, parts),
            in_specs=[
                pl.BlockSpec((tile, inner), rows_block),
                *(bank_specs(i, bank) for i, bank in enumerate(banks)),
            ],
            out_specs=pl.BlockSpec((tile, outer), lambda o, v, c, visits, *_: (visits.tile[v], o)),
            scratch_shapes=[pltpu.VMEM((tile, outer), jnp.float32)] * (parts > 1),
        ),
        compiler_params=_compiler_params(),
        name="grouped_matmul",
    )(visits, fetched, firsts, x, *(bank.matrices for bank in banks))
    return out[:own_rows]


def _multiply_kernel(
    visits: VisitRefs,
    _fetched: FetchRefs,
    _firsts: jax.Ref,
    x: jax.Ref,
    *refs: Any,
    ranges: list[tuple[int, int]],
    nobody: int,
    piece: int,
    transposed: bool,
    last: int,
) -> None:
    """Visits of a column of blocks of the result.

    Args:
        last: inner width of the last blocks that counts; what is behind it is not defined.
    """
    banks, (out, *sums) = refs[: len(ranges)], refs[len(ranges) :]
    visit, part = pl.program_id(1), pl.program_id(2)
    is_last = part == pl.num_programs(2) - 1
    group, begin = visits.group[visit], pl.multiple_of(visits.begin[visit], piece)

    def store(begin: Array | int, rows: int, values: Array | float) -> None:
        # Other rows of the window are stored by the visits before and after this one. Selecting
        # is done in float32: older chips have no 16-bit vector arithmetic.
        window = pl.ds(begin, rows)
        before = out[window, :].astype(jnp.float32)
        own = _own_rows(visits, visit, begin, before.shape)
        out[window, :] = jnp.where(own, values, before).astype(out.dtype)

    @pl.when((group == nobody) & is_last)
    def _zeros() -> None:
        store(0, out.shape[0], 0.0)

    def multiply(rows: int, bank: jax.Ref | Quantised) -> None:
        window = pl.ds(begin, rows)
        left, right = x[window, :], bank[...]
        if last < x.shape[1]:
            left, right = (_cut(a, last, is_last) for a in (left, right.astype(jnp.float32)))
        product = jax.lax.dot_general(
            left.astype(x.dtype),
            right.astype(x.dtype),
            (((1,), (1 if transposed else 0,)), ((), ())),
            preferred_element_type=jnp.float32,
        )
        if not sums:
            store(begin, rows, product)
            return
        (total,) = sums

        @pl.when(part == 0)
        def _begin() -> None:
            total[window, :] = product

        @pl.when(part > 0)
        def _add() -> None:
            total[window, :] += product

        @pl.when(is_last)
        def _end() -> None:
            store(begin, rows, total[window, :])

    for bank, (first, count) in zip(banks, ranges, strict=True):
        here = (group >= first) & (group < first + count)
        for pieces in range(1, PIECES + 1):
            pl.when(here & (visits.pieces[visit] == pieces))(
                partial(multiply, pieces * piece, bank)
            )


def _cut(values: Array, last: int, is_last: Array) -> Float[Array, "_ inner"]:
    """Zeros for the columns of a last block that do not count."""
    column = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    return jnp.where((column < last) | ~is_last, values.astype(jnp.float32), 0)


def weight_gradient(
    x: Float[Array, "N D"],
    grad: Float[Array, "N F"],
    groups: Groups,
    first: int,
    count: int,
) -> Float[Array, "count D F"]:
    """As `xla.weight_gradient`."""
    in_width, out_width = x.shape[1], grad.shape[1]
    piece = piece_rows(len(x), len(groups.sizes))
    x, grad = _pad_to_tile(x, piece), _pad_to_tile(grad, piece)
    asked, tile = slice(first, first + count), PIECES * piece
    # Groups without rows are visited too: their zeros must be stored.
    visits, num_visits = plan_visits(
        (groups.ends - groups.sizes)[asked],
        groups.sizes[asked],
        len(x),
        piece,
        visit_empty=True,
    )
    inner, outer = gradient_widths(len(visits.tile), count, tile, in_width, out_width, x.dtype)
    return pl.pallas_call(
        partial(_gradient_kernel, piece=piece),
        out_shape=jax.ShapeDtypeStruct((count, in_width, out_width), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(in_width, inner), pl.cdiv(out_width, outer), num_visits),
            in_specs=[
                pl.BlockSpec((tile, inner), lambda i, o, v, visits: (visits.tile[v], i)),
                pl.BlockSpec((tile, outer), lambda i, o, v, visits: (visits.tile[v], o)),
            ],
            out_specs=pl.BlockSpec(
                (None, inner, outer), lambda i, o, v, visits: (visits.group[v], i, o)
            ),
        ),
        compiler_params=_compiler_params(),
        name="grouped_weight_gradient",
    )(visits, x, grad)


def _gradient_kernel(
    visits: VisitRefs, x: jax.Ref, grad: jax.Ref, out: jax.Ref, *, piece: int
) -> None:
    visit = pl.program_id(2)
    begin = pl.multiple_of(visits.begin[visit], piece)

    # The block of a group stays in VMEM until all visits to it are done.
    @pl.when((visit == 0) | (visits.group[visit] != visits.group[jnp.maximum(visit - 1, 0)]))
    def _zeros() -> None:
        out[...] = jnp.zeros_like(out)

    def add(rows: int) -> None:
        def own(ref: jax.Ref) -> Array:
            # Both sides are masked: a foreign row's infinity times 0 would be NaN.
            values = ref[pl.ds(begin, rows), :].astype(jnp.float32)
            mask = _own_rows(visits, visit, begin, values.shape)
            return jnp.where(mask, values, 0).astype(ref.dtype)

        out[...] += jax.lax.dot_general(
            own(x), own(grad), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )

    for pieces in range(1, PIECES + 1):
        pl.when(visits.pieces[visit] == pieces)(partial(add, pieces * piece))


def _own_rows(visits: VisitRefs, visit: Array, begin: Array | int, shape: tuple[int, ...]) -> Array:
    """Which rows of a window that begins at `begin` are the visited group's."""
    row = begin + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return (row >= visits.low[visit]) & (row < visits.high[visit])


def _pad_to_tile(x: Array, piece: int) -> Array:
    """At least one tile of rows. The last of several tiles need not be full."""
    return jnp.pad(x, ((0, max(PIECES * piece - len(x), 0)), (0, 0)))


def _compiler_params() -> pltpu.CompilerParams:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit()
    )
