"""A kernel with operands, and what it should give."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from esft_jax.adapt.lora import Trained
from esft_jax.checking.reference import Array64
from esft_jax.memory import local_memory
from esft_jax.model.config import ModelConfig
from esft_jax.ops.platform import target_platform
from esft_jax.ops.quantisation import Quantisation

RESULT = "result"


@dataclass(frozen=True)
class Subject:
    """The run whose kernels are checked.

    Attributes:
        dtype: of its computation.
        length: tokens of its rows.
    """

    model: ModelConfig
    trained: Trained
    quantisation: Quantisation | None
    dtype: str
    length: int


@dataclass(frozen=True)
class Kernel:
    """A kernel with operands.

    Attributes:
        name: such as `experts gate_up`.
        shape: its sizes, in words.
        implementation: what computes it here.
        dtype: of what goes through it.
        operands: what is differentiated, by name.
        given: what is not.
        cotangent: of the result.
        apply: `(operands, given) -> result`, to be traced.
        exact: the result, by the name `RESULT`, and the gradients of the operands, from the numbers
            that the operands have.
        narrowest: types that numbers are rounded to on the way, of those results and gradients for
            which it is not `dtype`.
        terms: of the longest sum.
        operations: of the result, and of all gradients together with what of the result they need.
        by_head: results are `[B, S, H, ...]`: heads are computed apart from each other.
    """

    name: str
    shape: str
    implementation: str
    dtype: str
    operands: dict[str, Any]
    given: Any
    cotangent: Array
    apply: Callable[[dict[str, Any], Any], Array]
    exact: Callable[[], dict[str, Array64]]
    terms: int
    operations: tuple[float, float]
    narrowest: dict[str, DTypeLike] = field(default_factory=dict)
    by_head: bool = False

    def gradients(self) -> Callable[[dict[str, Any], Any, Array], dict[str, Any]]:
        """The function `(operands, given, cotangent) -> gradients`, to be traced."""

        def gradients(operands: dict[str, Any], given: Any, cotangent: Array) -> dict[str, Any]:
            _, pull = jax.vjp(lambda operands: self.apply(operands, given), operands)
            return pull(cotangent)[0]

        return gradients

    def tiled(self, array: np.ndarray) -> np.ndarray:
        """A result or gradient with the axes last that a kernel cuts into tiles."""
        if not self.by_head or array.ndim < 3:
            return array
        array = array if array.ndim > 3 else array[..., None]
        return array.swapaxes(1, 2)


@dataclass(frozen=True)
class Limits:
    """How large operands may be, where they are not those of the run.

    Attributes:
        tokens: of a row that is compared; rows of two or more blocks of every kernel.
        timed_tokens: of a row that is timed, at most; None: as long as the run's.
        host_operations: of the reference on the host, about; heads and words are left out to keep
            to it.
        bank: bytes of an array of experts; experts are left out to keep to it.
    """

    tokens: int
    timed_tokens: int | None
    host_operations: float
    bank: int

    @classmethod
    def here(cls) -> "Limits":
        """For the device at hand."""
        memory = local_memory() or 2**34
        if target_platform() == "cpu":
            return cls(tokens=384, timed_tokens=256, host_operations=1e10, bank=memory // 256)
        return cls(tokens=1024, timed_tokens=None, host_operations=1e11, bank=memory // 4)

    def timed(self, length: int) -> int:
        """Tokens of a row that is timed."""
        return min(length, self.timed_tokens or length)


class Draw:
    """Random operands, made on the device; the same ones each time."""

    def __init__(self, dtype: DTypeLike):
        self.dtype, self.count = dtype, 0

    def key(self) -> jax.Array:
        """A new one, of a generator that is fast on every platform."""
        self.count += 1
        return jax.random.key(self.count, impl="unsafe_rbg")

    def __call__(self, *shape: int, std: float = 1.0, dtype: DTypeLike | None = None) -> Array:
        """Numbers of a standard deviation, which `dtype` of the kernel has, whatever type they
        are given in.
        """
        return uniform(self.key(), shape, std, self.dtype).astype(dtype or self.dtype)


def uniform(key: jax.Array, shape: tuple[int, ...], std: float, dtype: DTypeLike) -> Array:
    """Numbers around zero of a standard deviation."""
    bound = std * 3**0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound).astype(dtype)


def documents(length: int, whole: bool) -> np.ndarray:
    """Segments of a row: one document; or some of several lengths, the last tokens padding."""
    if whole:
        return np.ones((1, length), np.int32)
    ends = [int(length * share) for share in (0.45, 0.5, 0.8, 0.96)]
    ids = np.searchsorted(ends, np.arange(length), side="right") + 1
    return np.where(ids > len(ends), 0, ids).astype(np.int32)[None]


def to_host(array: Any) -> np.ndarray:
    """Numbers of the device, in a type that NumPy computes with."""
    return np.asarray(array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array)
