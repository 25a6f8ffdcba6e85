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
from flax.struct import dataclass, field
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from esft_jax.ops.grouped_matmul.bank import Bank
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
        banks: matrices of the groups in order, split over one or more arrays, or parts of arrays
            (`Bank`), that are neither concatenated nor copied. Matrices of a narrower type than `x`
            are widened as they are read; those of a wider one (float32 masters) are converted
            before.
        group_sizes: rows per group, int32; G is the total number of matrices.
        implementation: how it is computed; None takes the fastest of the platform that the
            surrounding mesh, or else JAX's default device, belongs to.

    Returns:
        The products, in the type of `x`.

    Raises:
        ValueError: `implementation` is unknown.

    The weight gradient is computed only for the banks that are differentiated, in the bank's own
    type: with tuned and frozen experts in two banks, frozen ones cost nothing.
    """
    if implementation is None:
        implementation = fastest_implementation()
        if implementation == "cpu" and x.dtype not in (jnp.float32, jnp.bfloat16):
            implementation = "xla"
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"grouped_matmul: implementation {implementation!r} is not one of {known}")
    all_banks = [b if isinstance(b, Bank) else Bank(jnp.asarray(b), 0, len(b)) for b in banks]
    filled = tuple(replace(b, first=jnp.int32(b.first)) for b in all_banks if b.matrices.size > 0)
    if len(x) == 0 or not filled:
        return jnp.zeros((len(x), all_banks[0].width(transposed=False)), x.dtype)
    return _grouped_matmul(implementation, x, filled, jnp.asarray(group_sizes, jnp.int32))


def _module(implementation: Implementation) -> ModuleType:
    return import_module(f"esft_jax.ops.grouped_matmul.{implementation}")


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
