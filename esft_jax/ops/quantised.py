"""Matrices of 8 or 4 bits a number, with scales: what a frozen weight may be kept as.

Letters: D inputs and F outputs of a matrix, P of its rows in `codes`, G groups of inputs.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.struct import dataclass, field
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from esft_jax.ops.quantisation import Scheme

# Two numbers in a byte.
_PACKED = ("int4", "mxfp4")
# Scales of MXFP4 are powers of two. A scale that is shared by numbers of 8 bits must be finer than
# their steps.
_SCALES = {
    "int8": jnp.float32,
    "int4": jnp.bfloat16,
    "mxfp4": jnp.bfloat16,
    "fp8": jnp.float32,
}
MXFP4_GROUP = 32  # OCP Microscaling Formats 1.0
# E4M3 of OFP8 (Micikevicius et al., arXiv 2209.05433), without infinities: its largest number.
_FP8_LARGEST = 448


@dataclass
class Quantised:
    """A matrix `[..., D, F]`, or a stack of some, as `number of a code * scale of its group`.

    Groups are consecutive inputs of one output. Index, shape and `astype` are those of the array
    that it stands for, so that code which only reads weights takes both.

    Attributes:
        codes: int8 `[..., D, F]`, or uint8 of fp8; or uint8 `[..., D / 2, F]` of numbers of 4 bits:
            those of the first half of the inputs in the lower bits and of the second half in the
            upper ones. So each half meets inputs that follow one another, and a kernel moves none
            of them.
        scales: `[..., G, F]`, float32 or bfloat16.
        scheme: what a code stands for.
        group_size: inputs that share a scale; the last group may have fewer.
    """

    codes: Int[Array, "*stack P F"]
    scales: Float[Array, "*stack G F"]
    scheme: Scheme = field(pytree_node=False)
    group_size: int = field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what it stands for."""
        *stack, rows, width = self.codes.shape
        return *stack, rows * per_byte(self.scheme), width

    @property
    def ndim(self) -> int:
        """Number of its axes."""
        return self.codes.ndim

    @property
    def size(self) -> int:
        """Numbers that it stands for."""
        return int(np.prod(self.shape))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> "Quantised":
        """Some matrices of a stack."""
        return jax.tree.map(lambda leaf: leaf[index], self)

    def reshape(self, *shape: int) -> "Quantised":
        """The same matrices in a stack of another shape."""
        assert shape[-2:] == self.shape[-2:], (shape, self.shape)
        return jax.tree.map(lambda leaf: leaf.reshape(*shape[:-2], *leaf.shape[-2:]), self)

    def astype(self, dtype: DTypeLike) -> Float[Array, "*stack D F"]:
        """The numbers; products with scales are made in float32."""
        values = jnp.concatenate(numbers(self.codes, self.scheme), axis=-2)
        scales = jnp.repeat(self.scales.astype(jnp.float32), self.group_size, axis=-2)
        return (values * scales[..., : values.shape[-2], :]).astype(dtype)


def per_byte(scheme: Scheme) -> int:
    """Numbers in a byte of `codes`."""
    return 2 if scheme in _PACKED else 1


def numbers(codes: Int[Array, "*stack P F"], scheme: Scheme) -> list[Float[Array, "*stack P F"]]:
    """What codes stand for, without scales, in float32: of packed ones, each half of the inputs.

    Kernels call it, so it is made of what their languages have: no table is looked up.
    """
    wide = codes.astype(jnp.int32)
    if scheme == "int8":
        return [wide.astype(jnp.float32)]
    if scheme == "fp8":
        return [_fp8(wide)]
    halves = [wide & 15, (wide >> 4) & 15]
    if scheme == "int4":
        return [jnp.where(half > 7, half - 16, half).astype(jnp.float32) for half in halves]
    return [_mxfp4(half) for half in halves]


def _mxfp4(code: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Of a sign, two bits of exponent and one of mantissa; all are multiples of 1/2."""
    exponent, mantissa = (code >> 1) & 3, code & 1
    doubled = jnp.where(exponent > 0, (2 + mantissa) << jnp.maximum(exponent - 1, 0), mantissa)
    return jnp.where(code > 7, -doubled, doubled).astype(jnp.float32) * 0.5


def _fp8(code: Int[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Of a sign, four bits of exponent and three of mantissa; all are multiples of 2 ** -9."""
    exponent, mantissa = (code >> 3) & 15, code & 7
    steps = jnp.where(exponent > 0, (8 + mantissa) << jnp.maximum(exponent - 1, 0), mantissa)
    values = steps.astype(jnp.float32) * 2.0**-9
    return jnp.where(code > 127, -values, values)


def problem(shape: Sequence[int], scheme: Scheme) -> str | None:
    """Why matrices of a shape cannot be quantised, if they cannot."""
    if shape[-2] % per_byte(scheme):
        return f"{scheme} packs two inputs in a byte; a matrix has {shape[-2]}"
    return None


@partial(jax.jit, static_argnames=("scheme", "group_size"))
def quantise(matrices: Float[Array, "*stack D F"], scheme: Scheme, group_size: int) -> Quantised:
    """The nearest numbers of a scheme, scaled by the largest of each group.

    MXFP4 gives numbers back that were in MXFP4 before. What is published in fp8 is not rounded
    here again: its codes and scales are read (`esft_jax.checkpoint.fp8`).

    Args:
        group_size: inputs that share a scale; that of MXFP4 is set by its standard, whatever is
            given here.

    Raises:
        ValueError: see `problem`.
    """
    if reason := problem(matrices.shape, scheme):
        raise ValueError(f"quantise: {reason}")
    if scheme == "mxfp4":
        group_size = MXFP4_GROUP
    *stack, inputs, _ = matrices.shape
    filled = -inputs % group_size
    whole = jnp.pad(matrices.astype(jnp.float32), [*[(0, 0)] * len(stack), (0, filled), (0, 0)])
    if scheme == "mxfp4":
        codes, scales = _in_mxfp4(whole)
    elif scheme == "fp8":
        codes, scales = _in_fp8(whole, group_size)
    else:
        codes, scales = _in_integers(whole, scheme, group_size)
    codes = codes[..., :inputs, :]
    if per_byte(scheme) == 2:
        first, second = jnp.split(codes.astype(jnp.uint8) & 15, 2, axis=-2)
        codes = first | (second << 4)
    return Quantised(codes, scales.astype(_SCALES[scheme]), scheme, group_size)


def _in_integers(
    matrices: Float[Array, "*stack D F"], scheme: Scheme, group_size: int
) -> tuple[Int[Array, "*stack D F"], Float[Array, "*stack G F"]]:
    import qwix  # slow to import, and needed by few runs

    inputs = matrices.ndim - 2
    found = qwix.quantize(
        matrices,
        scheme,
        channelwise_axes=[axis for axis in range(matrices.ndim) if axis != inputs],
        tiled_axes={inputs: group_size},
    )
    return found.qvalue.astype(jnp.int8), found.scale


def _in_mxfp4(
    matrices: Float[Array, "*stack D F"],
) -> tuple[Int[Array, "*stack D F"], Float[Array, "*stack G F"]]:
    """By the smallest power of two that takes the largest of a group to at most 6.

    Not by qwix, which takes a logarithm: in float32 some powers of two come out twice as large.
    """
    *stack, _, width = matrices.shape
    groups = matrices.reshape(*stack, -1, MXFP4_GROUP, width)
    fraction, exponent = jnp.frexp(jnp.abs(groups).max(axis=-2, keepdims=True) / 6)
    scales = jnp.ldexp(jnp.float32(1), jnp.where(fraction > 0.5, exponent, exponent - 1))
    values = (groups / scales).astype(jnp.float4_e2m1fn).astype(jnp.float32)
    # Not by a bit cast, which not every compiler of JAX 0.10 can do.
    doubled = (2 * jnp.abs(values)).astype(jnp.int32)
    above = jnp.where(doubled < 8, 2 + doubled // 2, 4 + doubled // 4)
    codes = jnp.where(doubled < 4, doubled, above) + 8 * (values < 0)
    return codes.reshape(matrices.shape), scales[..., 0, :]


def _in_fp8(
    matrices: Float[Array, "*stack D F"], group_size: int
) -> tuple[Int[Array, "*stack D F"], Float[Array, "*stack G F"]]:
    *stack, _, width = matrices.shape
    groups = matrices.reshape(*stack, -1, group_size, width)
    scales = jnp.abs(groups).max(axis=-2, keepdims=True) / _FP8_LARGEST
    values = (groups / jnp.where(scales > 0, scales, 1)).astype(jnp.float8_e4m3fn)
    codes = jax.lax.bitcast_convert_type(values, jnp.uint8)
    return codes.reshape(matrices.shape), scales[..., 0, :]
