"""The operation and its gradients; how products are computed is left to an implementation.

Letters: N rows, G groups, D input width, F output width. An implementation is a module with two
functions, which `xla.py` documents: `multiply` and `weight_gradient`.
"""

from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax.struct import dataclass, field
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

# Modules of this package, imported when used: kernel languages are slow to import.
Implementation = Literal["gpu", "tpu", "xla"]
# What `None` chooses on each platform; "xla" on any other.
_FASTEST: dict[str, Implementation] = {"gpu": "gpu", "tpu": "tpu"}


def grouped_matmul(
    x: Float[Array, "N D"],
    banks: Sequence[Float[Array, "_ D F"]],
    group_sizes: Int[Array, " G"],
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
        implementation = _FASTEST.get(_platform(), "xla")
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"grouped_matmul: implementation {implementation!r} is not one of {known}")
    filled = tuple(bank for bank in banks if len(bank) > 0)
    if len(x) == 0 or not filled:
        return jnp.zeros((len(x), banks[0].shape[2]), x.dtype)
    return _grouped_matmul(implementation, x, filled, jnp.asarray(group_sizes))


def _platform() -> str:
    """Platform compiled for. Inside `shard_map` it is the mesh's, which may be one that this
    machine does not have (ahead-of-time compilation).
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def _module(implementation: Implementation) -> ModuleType:
    return import_module(f"esft_jax.ops.grouped_matmul.{implementation}")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(
    implementation: Implementation, x: Array, banks: tuple[Array, ...], group_sizes: Array
) -> Array:
    return _multiply(implementation, x, banks, group_sizes, transposed=False)


def _multiply(
    implementation: Implementation,
    x: Array,
    banks: tuple[Array, ...],
    group_sizes: Array,
    transposed: bool,
) -> Array:
    # Here XLA can convert a bank while it cuts it out of its stack; a block is read many times.
    banks = tuple(
        bank.astype(x.dtype) if bank.dtype.itemsize > x.dtype.itemsize else bank for bank in banks
    )
    return _module(implementation).multiply(x, banks, group_sizes, transposed=transposed)


@dataclass
class _Needed:
    """Trace-time facts for the backward rule: which gradients to compute."""

    x: bool = field(pytree_node=False)
    banks: tuple[bool, ...] = field(pytree_node=False)


def _forward(
    implementation: Implementation,
    x: CustomVJPPrimal,
    banks: tuple[CustomVJPPrimal, ...],
    group_sizes: CustomVJPPrimal,
) -> tuple[Array, tuple]:
    values = tuple(bank.value for bank in banks)
    out = _grouped_matmul(implementation, x.value, values, group_sizes.value)
    # Whether an operand is differentiated is known while tracing, so what nobody asked for is
    # neither computed nor, for `x`, kept.
    learned = tuple(bank.perturbed for bank in banks)
    kept = x.value if any(learned) else None
    return out, (kept, values, group_sizes.value, _Needed(x.perturbed, learned))


def _backward(implementation: Implementation, residuals: tuple, grad: Array) -> tuple:
    x, banks, group_sizes, needed = residuals
    module = _module(implementation)
    dx = _multiply(implementation, grad, banks, group_sizes, transposed=True) if needed.x else None
    dbanks, first = [], 0
    for bank, learned in zip(banks, needed.banks, strict=True):
        with jax.named_scope("expert_weight_gradient"):
            dbanks.append(
                module.weight_gradient(x, grad, group_sizes, first, len(bank)).astype(bank.dtype)
                if learned
                else None
            )
        first += len(bank)
    return dx, tuple(dbanks), None


_grouped_matmul.defvjp(_forward, _backward, symbolic_zeros=True)
