"""The operation and its gradients; how products are computed is left to an implementation.

Letters: N rows, G groups, D input width, F output width. An implementation is a module with two
functions, which `xla.py` documents: `multiply` and `weight_gradient`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax.struct import dataclass, field
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from esft_jax.moe.grouped_matmul.bank import Bank
from esft_jax.ops.platform import fastest_implementation

# Modules of this package, imported when used: kernel languages are slow to import.
Implementation = Literal["cpu", "gpu", "tpu", "xla"]


def grouped_matmul(
    x: Float[Array, "N D"],
    banks: Sequence[Float[Array, "_ D F"] | Bank],
    group_sizes: Int[Array, " G"],
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "N F"]:
    """Multiply each group of consecutive rows with its own matrix.

    Args:
        x: rows sorted by group. Rows past `sum(group_sizes)` belong to nobody: their result is 0.
            Float32 or bfloat16, like the matrices: integers and 8-bit floats would need a scale.
        banks: matrices of the groups in order, split over one or more arrays, or parts of arrays
            (`Bank`), that are neither concatenated nor copied. Matrices of a narrower type than `x`
            are widened as they are read; those of a wider one (float32 masters) are converted
            before.
        group_sizes: rows per group, integers; G is the total number of matrices. Sizes that are
            known only at run time cannot be refused: negative ones count as 0, and groups end with
            the rows.
        implementation: how it is computed; None takes the fastest of the platform that the
            surrounding mesh, or else JAX's default device, belongs to.

    Returns:
        The products, in the type of `x`.

    Raises:
        ValueError: `implementation` is unknown, another type, shapes that do not fit together, or
            sizes known by now that are negative or more than the rows.

    The weight gradient is computed only for the banks that are differentiated, in the bank's own
    type: with tuned and frozen experts in two banks, frozen ones cost nothing.
    """
    x = jnp.asarray(x)
    all_banks = [b if isinstance(b, Bank) else _whole(jnp.asarray(b)) for b in banks]
    _check_operands(x, all_banks, group_sizes)
    if implementation is None:
        implementation = fastest_implementation()
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"grouped_matmul: implementation {implementation!r} is not one of {known}")
    filled = tuple(_placed(bank) for bank in all_banks if bank.count and bank.matrices.size)
    if len(x) == 0 or not filled:
        return jnp.zeros((len(x), all_banks[0].width(transposed=False)), x.dtype)
    return _grouped_matmul(implementation, x, filled, _within(jnp.asarray(group_sizes), len(x)))


def _whole(matrices: Array) -> Bank:
    return Bank(matrices, 0, len(matrices) if matrices.ndim else 0)


def _check_operands(x: Array, banks: Sequence[Bank], group_sizes: Any) -> None:
    """What tracing can know. Kernels compute addresses from these, and check nothing."""
    if not banks:
        raise ValueError("grouped_matmul: no banks; expected one or more")
    if x.ndim != 2:
        raise ValueError(f"grouped_matmul: x has shape {x.shape}; expected [rows, width]")
    _check_type("x", x)
    for i, bank in enumerate(banks):
        name, shape = f"banks[{i}]", bank.matrices.shape
        expected = (bank.count, *shape[1:])
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
        if bank.own is not None and (bank.own.shape, bank.own.dtype) != (
            expected,
            bank.matrices.dtype,
        ):
            raise ValueError(
                f"grouped_matmul: {name}.own is {bank.own.dtype} {bank.own.shape}; expected "
                f"{bank.matrices.dtype} {expected}"
            )
    groups = sum(map(len, banks))
    sizes = group_sizes if isinstance(group_sizes, jax.Array) else np.asarray(group_sizes)
    if sizes.shape != (groups,) or not (groups == 0 or jnp.issubdtype(sizes.dtype, jnp.integer)):
        raise ValueError(
            f"grouped_matmul: group_sizes is {sizes.dtype} {sizes.shape}; expected integers "
            f"({groups},), one for each matrix"
        )
    if isinstance(sizes, np.ndarray) and (np.any(sizes < 0) or sizes.sum() > len(x)):
        raise ValueError(
            f"grouped_matmul: group_sizes {sizes.tolist()}; expected none below 0, and a sum of at "
            f"most the {len(x)} rows"
        )


def _check_type(name: str, array: Array) -> None:
    if array.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"grouped_matmul: {name} is {array.dtype}; expected float32 or bfloat16")


def _placed(bank: Bank) -> Bank:
    """With `first` as an array, and inside of the array whatever its value."""
    last = len(bank.matrices) - bank.count
    return replace(bank, first=jnp.clip(jnp.int32(bank.first), 0, last))


def _within(group_sizes: Array, rows: int) -> Int[Array, " G"]:
    """Sizes with which every group lies within the rows, whatever they are at run time: kernels
    read and write where they say. Those of a `Dispatch` do not change.
    """
    sizes = jnp.clip(group_sizes, 0, rows).astype(jnp.int32)
    # Sums too large for int32 are negative; the ends must not go back.
    ends = jax.lax.cummax(jnp.clip(jnp.cumsum(sizes), 0, rows))
    return jnp.diff(ends, prepend=0)


def _module(implementation: Implementation) -> ModuleType:
    return import_module(f"esft_jax.moe.grouped_matmul.{implementation}")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    implementation: Implementation, x: Array, banks: tuple[Bank, ...], group_sizes: Array
) -> Array:
    return _multiply(implementation, x, banks, group_sizes, transposed=False)


def _multiply(
    implementation: Implementation,
    x: Array,
    banks: tuple[Bank, ...],
    group_sizes: Array,
    transposed: bool,
) -> Array:
    def read(bank: Bank) -> Bank:
        if bank.matrices.dtype.itemsize <= x.dtype.itemsize:
            return bank
        # XLA converts while it cuts out; a kernel would read, and convert, a block many times.
        cut = jax.lax.dynamic_slice_in_dim(bank.matrices, bank.first, bank.count)
        return Bank(cut.astype(x.dtype), jnp.zeros_like(bank.first), bank.count)

    return _module(implementation).multiply(
        x, tuple(map(read, banks)), group_sizes, transposed=transposed
    )


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
    group_sizes: CustomVJPPrimal,
) -> tuple[Array, tuple]:
    # Here the leaves of banks are `CustomVJPPrimal`s. Whether an operand is differentiated is known
    # while tracing, so what nobody asked for is neither computed nor, for `x`, kept.
    def learned(bank: Any) -> str | None:
        names = ("matrices",) if bank.own is None else ("own", "matrices")
        return next((name for name in names if getattr(bank, name).perturbed), None)

    needed = _Needed(x.perturbed, tuple(map(learned, banks)))
    read = tuple(Bank(b.matrices.value, b.first.value, b.count) for b in banks)
    out = _grouped_matmul(implementation, x.value, read, group_sizes.value)
    kept = x.value if any(needed.banks) else None
    return out, (kept, read, group_sizes.value, needed)


def _backward(implementation: Implementation, residuals: tuple, grad: Array) -> tuple:
    x, banks, group_sizes, needed = residuals
    module = _module(implementation)
    dx, dbanks, begin = None, [], 0
    if needed.x:
        dx = _multiply(implementation, grad, banks, group_sizes, transposed=True)
    for bank, learned in zip(banks, needed.banks, strict=True):
        gradient = {"matrices": None, "own": None}
        if learned:
            with jax.named_scope("expert_weight_gradient"):
                dbank = module.weight_gradient(x, grad, group_sizes, begin, bank.count)
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
