"""The grouped products of a layer's experts.

Letters: N rows, E base experts, W tuned ones, D and F the sides of a matrix, R the rank of an
update.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.checking.kernel import RESULT, Draw, Kernel, Limits, Subject, to_host, uniform
from esft_jax.checking.reference import Array64, dequantised, grouped_products, rows_of
from esft_jax.moe.grouped_matmul import Bank, grouped_matmul
from esft_jax.moe.weights import update_rows
from esft_jax.ops.platform import fastest_implementation
from esft_jax.ops.quantisation import Quantisation
from esft_jax.ops.quantised import Quantised, per_byte, quantise

ROWS = 512  # that are compared
# Their shares of the groups that have rows: longer and shorter than a tile; some rows are padding.
_SHARES = (0.36, 0.02, 0.24, 0.11, 0.23)

Make = Callable[[bool], Kernel]


class _Sizes(NamedTuple):
    """Of a product: sides of a matrix, experts, and those of them that are tuned or updated."""

    inputs: int
    width: int
    experts: int
    tuned: int

    @property
    def groups(self) -> int:
        return self.experts + self.tuned


def expert_kernels(subject: Subject, dtype: str, limits: Limits) -> Iterator[Make]:
    """What makes each kernel: for a comparison (True), or as large as the run's, to be timed."""
    model, trained = subject.model, subject.trained
    how = subject.quantisation
    tuned = _most(trained) if isinstance(trained, ExpertConfig) else 0
    byte: float = jnp.dtype(jnp.float32 if trained is None else dtype).itemsize
    if how and how.experts:
        byte = 1 / per_byte(how.experts)
    sides = {
        "gate_up": (model.hidden_size, 2 * model.expert_width),
        "down": (model.expert_width, model.hidden_size),
    }
    for name, (inputs, width) in sides.items():
        experts = max(1, min(model.router.num_experts, int(limits.bank / (inputs * width * byte))))
        sizes = _Sizes(inputs, width, experts, min(tuned, experts))
        yield partial(_product, subject, name, sizes, dtype, limits, how)
        if model.expert_bias:
            yield partial(
                _product, subject, f"{name}_bias", sizes._replace(inputs=1), dtype, limits, None
            )
        if isinstance(trained, LoRA) and trained.experts.num_experts_selected:
            rank = trained.rank * (2 if name == "gate_up" else 1)
            updated = min(_most(trained.experts), experts)
            yield partial(
                _update, subject, name, sizes._replace(tuned=updated), rank, dtype, limits
            )


def _most(experts: ExpertConfig) -> int:
    """Experts of the layer that has most of them."""
    return max(map(len, experts.experts.values()), default=0)


def _product(
    subject: Subject,
    name: str,
    sizes: _Sizes,
    dtype: str,
    limits: Limits,
    how: Quantisation | None,
    compared: bool,
) -> Kernel:
    """Rows times matrices of tuned and of base experts, as `GroupWeights.multiply` has them."""
    draw, learned = Draw(dtype), subject.trained is None
    counts, rows = _rows(subject, sizes, limits, compared)
    std = sizes.inputs**-0.5
    shape = sizes.inputs, sizes.width
    operands = {"x": draw(rows, sizes.inputs)}
    if sizes.tuned:
        operands["tuned"] = draw(sizes.tuned, *shape, std=std, dtype=jnp.float32)
    group_size = how.group_size if how else 1
    if how and how.experts == "fp8" and subject.model.fp8_block:
        _, group_size = subject.model.fp8_block  # as published
    stored = "float32" if learned else dtype
    base = _bank(draw, sizes.experts, shape, std, how, group_size, stored, dtype)
    if learned:
        operands["base"], base = base, None

    def apply(operands: dict[str, Any], given: Any) -> Array:
        base, counts = given
        own = operands.get("base")
        if own is not None:  # trained as `LearnedStack` is
            base = jax.lax.stop_gradient(own)
        # Where a layer begins in the stack of all is known at run time only.
        bank = Bank(base, jnp.int32(0) * counts[0], len(base), own)
        tuned = operands.get("tuned")
        return grouped_matmul(operands["x"], (bank,) if tuned is None else (tuned, bank), counts)

    def exact() -> dict[str, Array64]:
        parts = rows_of(counts, np.cumsum(counts) - counts)
        matrices = operands["base"] if learned else base
        values = {
            group: to_host(operands["tuned"][group])
            if group < sizes.tuned
            else _values(matrices[group - sizes.tuned])
            for group in parts
        }
        out, dx, found = grouped_products(
            to_host(operands["x"]), values, parts, sizes.width, to_host(cotangent)
        )
        results = {RESULT: out, "x": dx}
        for operand, first in (("tuned", 0), ("base", sizes.tuned)):
            if operand in operands:
                gradient = np.zeros(operands[operand].shape)
                for group in range(len(gradient)):
                    gradient[group] = found.get(first + group, 0)
                results[operand] = gradient
        return results

    cotangent = draw(rows, sizes.width)
    forward = 2.0 * rows * sizes.inputs * sizes.width
    of_matrices = sum(counts) if learned else sum(counts[: sizes.tuned])
    return Kernel(
        name=f"experts {name}" + (f", {how.experts}" if how and how.experts else ""),
        shape=f"{rows} x {sizes.inputs} x {sizes.width}, {_described(sizes)}",
        implementation=fastest_implementation(),
        dtype=dtype,
        operands=operands,
        given=(base, np.asarray(counts, np.int32)),
        cotangent=cotangent,
        apply=apply,
        exact=exact,
        terms=max(sizes.inputs, sizes.width, rows),
        operations=(forward, forward * (1 + of_matrices / rows)),
        # Masters get gradients of products of what is in `dtype` already.
        narrowest={"tuned": jnp.float32, "base": jnp.float32},
    )


def _update(
    subject: Subject,
    name: str,
    sizes: _Sizes,
    rank: int,
    dtype: str,
    limits: Limits,
    compared: bool,
) -> Kernel:
    """Low-rank updates of some experts' products, whose rows lie anywhere among those of others."""
    draw = Draw(dtype)
    updated, sizes = sizes.tuned, sizes._replace(tuned=0)
    counts, rows = _rows(subject, sizes, limits, compared)
    # Row g updates expert g if all are updated; else those that have rows come first.
    sources = None
    if updated < sizes.experts:
        order = np.argsort(-np.asarray(counts), kind="stable")[:updated]
        sources = np.random.default_rng(0).permutation(order).astype(np.int32)
    operands = {
        "x": draw(rows, sizes.inputs),
        "a": draw(updated, sizes.inputs, rank, std=sizes.inputs**-0.5, dtype=jnp.float32),
        "b": draw(updated, rank, sizes.width, std=rank**-0.5, dtype=jnp.float32),
    }

    def apply(operands: dict[str, Any], given: Any) -> Array:
        sources, counts = given
        return update_rows(operands["x"], (operands["a"], operands["b"]), sources, counts)

    def exact() -> dict[str, Array64]:
        of = range(updated) if sources is None else sources.tolist()
        begins = np.cumsum(counts) - counts
        parts = rows_of([counts[i] for i in of], [int(begins[i]) for i in of])
        x, a, b = (to_host(operands[key]) for key in ("x", "a", "b"))
        given = to_host(cotangent)
        inner, _, _ = grouped_products(x, dict(enumerate(a)), parts, rank, np.zeros((rows, rank)))
        out, dinner, db = grouped_products(
            inner, dict(enumerate(b)), parts, sizes.width, given.astype(np.float64)
        )
        _, dx, da = grouped_products(x, dict(enumerate(a)), parts, rank, dinner)
        results = {RESULT: out, "x": dx, "a": np.zeros(a.shape), "b": np.zeros(b.shape)}
        for group in parts:
            results["a"][group], results["b"][group] = da[group], db[group]
        return results

    cotangent = draw(rows, sizes.width)
    served = sum(counts) if sources is None else sum(counts[i] for i in sources)
    forward = 2.0 * served * rank * (sizes.inputs + sizes.width)
    return Kernel(
        name=f"update of experts {name}",
        shape=f"{rows} x {sizes.inputs} x {rank} x {sizes.width}, {updated} of {sizes.experts}",
        implementation=fastest_implementation(),
        dtype=dtype,
        operands=operands,
        given=(sources, np.asarray(counts, np.int32)),
        cotangent=cotangent,
        apply=apply,
        exact=exact,
        terms=max(sizes.inputs, sizes.width, rows),
        operations=(forward, 2 * forward),
    )


def _described(sizes: _Sizes) -> str:
    return f"{sizes.experts} experts" + (f", {sizes.tuned} tuned" if sizes.tuned else "")


def _rows(
    subject: Subject, sizes: _Sizes, limits: Limits, compared: bool
) -> tuple[Sequence[int], int]:
    """Rows of each group, tuned ones first, and of all together."""
    counts = np.zeros(sizes.groups, np.int64)
    if not compared:
        rows = limits.timed(subject.length) * subject.model.router.top_k
        counts[: sizes.experts] = rows // sizes.experts
        counts[: rows % sizes.experts] += 1
        return counts.tolist(), rows
    first, last = sizes.tuned, sizes.groups - 1
    chosen = sorted({0, max(first - 1, 0), first, (first + last) // 2, last})
    shares = np.asarray(_SHARES[: len(chosen)])
    counts[chosen] = ROWS * 0.96 * shares / shares.sum()
    return counts.tolist(), ROWS


def _bank(
    draw: Draw,
    experts: int,
    shape: tuple[int, int],
    std: float,
    how: Quantisation | None,
    group_size: int,
    stored: DTypeLike,
    dtype: DTypeLike,
) -> Any:
    """Matrices of base experts, one at a time: quantised ones are never held in full precision."""

    def one(key: jax.Array) -> Any:
        matrix = uniform(key, shape, std, dtype)
        if how is not None and how.experts is not None:
            return quantise(matrix, how.experts, group_size)
        return matrix.astype(stored)

    keys = jax.random.split(draw.key(), experts)
    return jax.jit(lambda keys: jax.lax.map(one, keys))(keys)


def _values(matrix: Any) -> np.ndarray:
    if not isinstance(matrix, Quantised):
        return to_host(matrix)
    codes, scales = to_host(matrix.codes), to_host(matrix.scales)
    return dequantised(codes, scales, matrix.scheme, matrix.group_size)
