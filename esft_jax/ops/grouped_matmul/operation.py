"""The operation and its gradients; how products are computed is left to an implementation.

Letters: N rows, G groups, D input width, F output width. An implementation is a module with two
functions, which `xla.py` documents: `multiply` and `weight_gradient`.
"""

import math
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax.struct import dataclass, field
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from esft_jax.ops.grouped_matmul.bank import Bank, LearnedLayer
from esft_jax.ops.platform import fastest_implementation

# Modules of this package, imported when used: kernel languages are slow to import.
Implementation = Literal["cpu", "gpu", "tpu", "xla"]


def grouped_matmul(
    x: Float[Array, "N D"],
    banks: Sequence[Float[Array, "*L _ D F"] | LearnedLayer],
    group_sizes: Int[Array, " G"],
    layer: Int[Array, ""] | int = 0,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "N F"]:
    """Multiply each group of consecutive rows with its own matrix.

    Args:
        x: rows sorted by group. Rows past `sum(group_sizes)` belong to nobody: their result is 0.
        banks: matrices of the groups in order, split over one or more arrays that are neither
            concatenated nor copied. Matrices of a narrower type than `x` are widened as they are
            read; those of a wider one (float32 masters) are converted before.
        group_sizes: rows per group, int32; G is the total number of matrices.
        layer: which entry of the banks that are stacks of layers `[L, _, D, F]`. It is read where
            it lies; cutting it out before would copy it. A stack that is differentiated gets a
            gradient of its own size, unless it is given as a `LearnedLayer`.
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
    filled = tuple(bank for bank in banks if math.prod(bank.shape) > 0)
    if len(x) == 0 or not filled:
        return jnp.zeros((len(x), banks[0].shape[-1]), x.dtype)
    sizes, layer = (jnp.asarray(a, jnp.int32) for a in (group_sizes, layer))
    return _grouped_matmul(implementation, x, filled, sizes, layer)


def _module(implementation: Implementation) -> ModuleType:
    return import_module(f"esft_jax.ops.grouped_matmul.{implementation}")


def _stack(bank: Any) -> Any:
    """What is read of a bank."""
    return bank.stack if isinstance(bank, LearnedLayer) else bank


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    implementation: Implementation,
    x: Array,
    banks: tuple[Array | LearnedLayer, ...],
    group_sizes: Array,
    layer: Array,
) -> Array:
    return _multiply(implementation, x, banks, group_sizes, layer, transposed=False)


def _multiply(
    implementation: Implementation,
    x: Array,
    banks: tuple[Array | LearnedLayer, ...],
    group_sizes: Array,
    layer: Array,
    transposed: bool,
) -> Array:
    def read(bank: Array) -> Bank:
        if bank.dtype.itemsize > x.dtype.itemsize:
            # XLA converts while it cuts out; a kernel would read, and convert, a block many times.
            bank = (bank[layer] if bank.ndim == 4 else bank).astype(x.dtype)
        return Bank(bank, layer) if bank.ndim == 4 else Bank(bank[None], jnp.zeros_like(layer))

    banks_read = tuple(read(_stack(bank)) for bank in banks)
    return _module(implementation).multiply(x, banks_read, group_sizes, transposed=transposed)


@dataclass
class _Needed:
    """Trace-time facts for the backward rule: which gradients to compute."""

    x: bool = field(pytree_node=False)
    banks: tuple[str, ...] = field(pytree_node=False)


def _forward(
    implementation: Implementation,
    x: CustomVJPPrimal,
    banks: tuple[Any, ...],
    group_sizes: CustomVJPPrimal,
    layer: CustomVJPPrimal,
) -> tuple[Array, tuple]:
    # What a learned layer is read from is no input of its gradient.
    values = tuple(_stack(bank).value for bank in banks)
    out = _grouped_matmul(implementation, x.value, values, group_sizes.value, layer.value)
    # Whether an operand is differentiated is known while tracing, so what nobody asked for is
    # neither computed nor, for `x`, kept.
    needed = _Needed(x.perturbed, tuple(_learned(bank) for bank in banks))
    kept = x.value if any(needed.banks) else None
    return out, (kept, values, group_sizes.value, layer.value, needed)


def _learned(bank: Any) -> Literal["layer", "bank", ""]:
    """What of it is differentiated."""
    kind: Literal["layer", "bank"] = "layer" if isinstance(bank, LearnedLayer) else "bank"
    return kind if getattr(bank, "own", bank).perturbed else ""


def _backward(implementation: Implementation, residuals: tuple, grad: Array) -> tuple:
    x, banks, group_sizes, layer, needed = residuals
    module = _module(implementation)
    dx, dbanks, first = None, [], 0
    if needed.x:
        dx = _multiply(implementation, grad, banks, group_sizes, layer, transposed=True)
    for bank, learned in zip(banks, needed.banks, strict=True):
        count, dbank = bank.shape[-3], None
        if learned:
            with jax.named_scope("expert_weight_gradient"):
                dbank = module.weight_gradient(x, grad, group_sizes, first, count)
                dbank = dbank.astype(bank.dtype)
            if learned == "bank" and bank.ndim == 4:
                dbank = jnp.zeros_like(bank).at[layer].set(dbank)
        dbanks.append(LearnedLayer._make((None, dbank)) if learned == "layer" else dbank)
        first += count
    return dx, tuple(dbanks), None, None


_grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
