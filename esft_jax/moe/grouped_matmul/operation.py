"""The operation and its gradients; how products are computed is left to an implementation.

Letters: N rows, G groups, D input width, F output width. An implementation is a module with two
functions, which `xla.py` documents: `multiply` and `weight_gradient`.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import pairwise
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.struct import dataclass, field
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from esft_jax.moe.grouped_matmul import single_row
from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.moe.grouped_matmul.groups import Groups
from esft_jax.ops.platform import fastest_implementation
from esft_jax.ops.quantised import Quantised

# Modules of this package, imported when used: kernel languages are slow to import.
Implementation = Literal["cpu", "gpu", "tpu", "xla"]


def grouped_matmul(
    x: Float[Array | np.ndarray, "N D"],
    banks: Sequence[Float[Array | np.ndarray, "_ D F"] | Quantised | Bank],
    group_sizes: Int[Array | np.ndarray, " G"] | Sequence[int],
    group_starts: Int[Array | np.ndarray, " G"] | Sequence[int] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "N F"]:
    """Multiply each group of consecutive rows with its own matrix.

    Args:
        x: rows; those of a group are consecutive. Rows of no group are padding: their result and
            their gradient are 0. Float32 or bfloat16, like the matrices: integers and 8-bit floats
            would need a scale.
        banks: matrices of the groups in order, split over one or more arrays, or parts of arrays
            (`Bank`), that are neither concatenated nor copied. Matrices of a narrower type than `x`
            are widened, and quantised ones dequantised, as they are read; those of a wider type
            (float32 masters) are converted before.
        group_sizes: rows per group, integers; G is the total number of matrices.
        group_starts: first row of each group, integers, in any order; there may be padding between
            groups. None if the groups follow one another from row 0 on. Sizes and starts that are
            known only at run time cannot be refused: negative ones count as 0, groups end with the
            rows, and rows that several groups claim belong to the one that begins first.
        implementation: how it is computed; None takes the fastest of the platform that the
            surrounding mesh, or else JAX's default device, belongs to.

    Returns:
        The products, in the type of `x`.

    Raises:
        ValueError: `implementation` is unknown, another type, shapes that do not fit together, or
            sizes and starts known by now that are negative, past the rows, or share rows; or
            quantised matrices are differentiated.

    The weight gradient is computed only for the banks that are differentiated, in the bank's own
    type: with tuned and frozen experts in two banks, frozen ones cost nothing.
    """
    x = jnp.asarray(x)
    all_banks = [b if isinstance(b, Bank) else _whole(b) for b in banks]
    _check_operands(x, all_banks)
    _check_groups(len(x), sum(map(len, all_banks)), group_sizes, group_starts)
    if implementation is None:
        implementation = fastest_implementation()
        if implementation == "gpu" and not all(map(_large_enough, all_banks)):
            implementation = "xla"
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"grouped_matmul: implementation {implementation!r} is not one of {known}")
    filled = tuple(_placed(bank) for bank in all_banks if bank.count and bank.matrices.size)
    if len(x) == 0 or not filled:
        return jnp.zeros((len(x), all_banks[0].width(transposed=False)), x.dtype)
    starts = None if group_starts is None else jnp.asarray(group_starts)
    groups = Groups.within(jnp.asarray(group_sizes), starts, len(x))
    return _grouped_matmul(implementation, x, filled, groups)


def _whole(matrices: Array | np.ndarray | Quantised) -> Bank:
    if not isinstance(matrices, Quantised):
        matrices = jnp.asarray(matrices)
    return Bank(matrices, 0, len(matrices) if matrices.ndim else 0)


def _check_operands(x: Array, banks: Sequence[Bank]) -> None:
    """What tracing can know. Kernels compute addresses from these, and check nothing."""
    if not banks:
        raise ValueError("grouped_matmul: no banks; expected one or more")
    if x.ndim != 2:
        raise ValueError(f"grouped_matmul: x has shape {x.shape}; expected [rows, width]")
    _check_type("x", x)
    for i, bank in enumerate(banks):
        name, shape = f"banks[{i}]", bank.matrices.shape
        expected = (bank.count, *shape[1:])
        if isinstance(bank.matrices, Quantised):
            _check_scales(name, bank.matrices)
        else:
            _check_type(name, bank.matrices)
        if len(shape) != 3 or shape[1] != x.shape[1] or shape[2] != banks[0].matrices.shape[2]:
            of_first = f" and the width of banks[0], {banks[0].matrices.shape}" if i else ""
            raise ValueError(
                f"grouped_matmul: {name} has shape {shape}; expected [matrices, {x.shape[1]}, "
                f"width], for x of shape {x.shape}{of_first}"
            )
        if not 0 <= bank.count <= shape[0]:
            raise ValueError(f"grouped_matmul: {name} has {bank.count} of {shape[0]} matrices")
        if (
            isinstance(bank.first, int | np.integer)
            and not 0 <= bank.first <= shape[0] - bank.count
        ):
            raise ValueError(
                f"grouped_matmul: {name} begins at {bank.first} and has {bank.count} matrices, of "
                f"{shape[0]}"
            )
        if bank.own is None:
            continue
        if isinstance(bank.matrices, Quantised):
            raise ValueError(f"grouped_matmul: {name}.own: quantised matrices are not trained")
        if (bank.own.shape, bank.own.dtype) != (
            expected,
            bank.matrices.dtype,
        ):
            raise ValueError(
                f"grouped_matmul: {name}.own is {bank.own.dtype} {bank.own.shape}; expected "
                f"{bank.matrices.dtype} {expected}"
            )


def _check_groups(rows: int, groups: int, group_sizes: Any, group_starts: Any) -> None:
    """What tracing can know of them; `Groups.within` takes care of the rest."""

    def integers(name: str, given: Any) -> Any:
        numbers = given if isinstance(given, jax.Array) else np.asarray(given)
        if numbers.shape != (groups,) or not (
            groups == 0 or jnp.issubdtype(numbers.dtype, jnp.integer)
        ):
            raise ValueError(
                f"grouped_matmul: {name} is {numbers.dtype} {numbers.shape}; expected integers "
                f"({groups},), one for each matrix"
            )
        return numbers

    sizes = integers("group_sizes", group_sizes)
    if isinstance(sizes, np.ndarray) and (np.any(sizes < 0) or sizes.sum() > rows):
        raise ValueError(
            f"grouped_matmul: group_sizes {sizes.tolist()}; expected none below 0, and a sum of at "
            f"most the {rows} rows"
        )
    starts = None if group_starts is None else integers("group_starts", group_starts)
    if not isinstance(starts, np.ndarray):
        return
    known = isinstance(sizes, np.ndarray)
    begins = starts.astype(np.int64)
    ends = begins + (sizes.astype(np.int64) if known else 0)
    if np.any(begins < 0) or np.any(ends > rows):
        raise ValueError(
            f"grouped_matmul: group_starts {starts.tolist()}"
            f"{f' with group_sizes {sizes.tolist()}' if known else ''}; expected none below 0, and "
            f"groups within the {rows} rows"
        )
    filled = [group for group in np.argsort(begins, kind="stable") if begins[group] < ends[group]]
    for one, other in pairwise(filled):
        if begins[other] < ends[one]:
            raise ValueError(
                f"grouped_matmul: groups {one} and {other} share rows: they have rows "
                f"{begins[one]} to {ends[one] - 1} and {begins[other]} to {ends[other] - 1}"
            )


def _check_type(name: str, array: Array) -> None:
    if array.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"grouped_matmul: {name} is {array.dtype}; expected float32 or bfloat16")


def _check_scales(name: str, matrices: Quantised) -> None:
    *stack, inputs, outputs = matrices.shape
    expected = (*stack, -(-inputs // matrices.group_size), outputs)
    scales, codes = matrices.scales, matrices.codes
    if scales.shape != expected or scales.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(
            f"grouped_matmul: {name} has scales of {scales.dtype} {scales.shape}; expected float32 "
            f"or bfloat16 {expected}, for groups of {matrices.group_size} inputs"
        )
    if codes.dtype not in (jnp.int8, jnp.uint8):
        raise ValueError(f"grouped_matmul: {name} has codes of {codes.dtype}; expected 8 bits each")


def _large_enough(bank: Bank) -> bool:
    """Whether a kernel for GPUs can take a part of the matrices that has one scale in each column.

    Triton multiplies at least 16 inputs at a time.
    """
    if not isinstance(bank.matrices, Quantised):
        return True
    return math.gcd(bank.matrices.group_size, bank.matrices.codes.shape[-2]) >= 16


def _placed(bank: Bank) -> Bank:
    """With `first` as an array, and inside of the array whatever its value."""
    last = len(bank.matrices) - bank.count
    return replace(bank, first=jnp.clip(jnp.int32(bank.first), 0, last))


def _module(implementation: Implementation) -> ModuleType:
    return import_module(f"esft_jax.moe.grouped_matmul.{implementation}")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    implementation: Implementation, x: Array, banks: tuple[Bank, ...], groups: Groups
) -> Array:
    return _multiply(implementation, x, banks, groups, transposed=False)


def _multiply(
    implementation: Implementation,
    x: Array,
    banks: tuple[Bank, ...],
    groups: Groups,
    transposed: bool,
) -> Array:
    def read(bank: Bank) -> Bank:
        if isinstance(bank.matrices, Quantised) or bank.matrices.dtype.itemsize <= x.dtype.itemsize:
            return bank
        # XLA converts while it cuts out; a kernel would read, and convert, a block many times.
        cut = jax.lax.dynamic_slice_in_dim(bank.matrices, bank.first, bank.count)
        return Bank(cut.astype(x.dtype), jnp.zeros_like(bank.first), bank.count)

    module = single_row if banks[0].matrices.shape[1] == 1 else _module(implementation)
    return module.multiply(x, tuple(map(read, banks)), groups, transposed=transposed)


@dataclass
class _Needed:
    """Trace-time facts for the backward rule: which gradients to compute.

    Of banks: of the attribute `own` or `matrices`, or none.
    """

    x: bool = field(pytree_node=False)
    banks: tuple[str | None, ...] = field(pytree_node=False)


def _forward(
    implementation: Implementation,
    x: CustomVJPPrimal,
    banks: tuple[Any, ...],
    groups: Groups,
) -> tuple[Array, tuple]:
    # Here the leaves of operands are `CustomVJPPrimal`s. Whether one is differentiated is known
    # while tracing, so what nobody asked for is neither computed nor, for `x`, kept.
    def learned(bank: Any) -> str | None:
        if isinstance(bank.matrices, Quantised):
            scales: Any = bank.matrices.scales
            if scales.perturbed:
                raise ValueError("grouped_matmul: quantised matrices have no gradient")
            return None
        names = ("matrices",) if bank.own is None else ("own", "matrices")
        return next((name for name in names if getattr(bank, name).perturbed), None)

    needed = _Needed(x.perturbed, tuple(map(learned, banks)))
    read, values = jax.tree.map(
        lambda leaf: leaf.value,
        (tuple(replace(bank, own=None) for bank in banks), groups),
        is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal),
    )
    out = _grouped_matmul(implementation, x.value, read, values)
    kept = x.value if any(needed.banks) else None
    return out, (kept, read, values, needed)


def _backward(implementation: Implementation, residuals: tuple, grad: Array) -> tuple:
    x, banks, groups, needed = residuals
    module = _module(implementation)
    dx, dbanks, begin = None, [], 0
    if needed.x:
        dx = _multiply(implementation, grad, banks, groups, transposed=True)
    for bank, learned in zip(banks, needed.banks, strict=True):
        gradient = {"matrices": None, "own": None}
        if learned:
            with jax.named_scope("expert_weight_gradient"):
                dbank = module.weight_gradient(x, grad, groups, begin, bank.count)
                dbank = dbank.astype(bank.matrices.dtype)
            if learned == "matrices" and bank.count < len(bank.matrices):
                dbank = jax.lax.dynamic_update_slice_in_dim(
                    jnp.zeros_like(bank.matrices), dbank, bank.first, 0
                )
            gradient[learned] = dbank
        dbanks.append(replace(bank, first=None, **gradient))
        begin += bank.count
    return dx, tuple(dbanks), None


_grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
