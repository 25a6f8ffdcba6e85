"""Parameter creation: values, roles, names of axes, and the leading layer axis."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum, auto

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from esft_jax.host_memory import Memory


class Role(StrEnum):
    """What a parameter is for. What is trained, decayed or updated is decided by it alone.

    No method trains those of `CONSTANTS`.
    """

    EMBEDDING = auto()
    HEAD = auto()
    NORM = auto()
    ATTENTION = auto()
    ROUTER = auto()
    SELECTION_BIAS = auto()  # of a router; load balancing set it once
    LAYER_SCALE = auto()  # of a layer's output; published as a constant
    DENSE_MLP = auto()
    SHARED_EXPERT = auto()
    ROUTED_EXPERT = auto()


CONSTANTS = frozenset({Role.SELECTION_BIAS, Role.LAYER_SCALE})


def expert_matrices_on_host(memory: Memory) -> Callable[[nnx.Variable], bool]:
    """Which parameters of a model are in the memory of the host: if any, the matrices of its base
    experts; see `param_shardings`.
    """

    def on_host(param: nnx.Variable) -> bool:
        stack = param.role is Role.ROUTED_EXPERT and param.axes[:2] == ("layers", "experts")
        return memory == "host" and stack and len(param.axes) == 4

    return on_host


@dataclass(frozen=True)
class ParamFactory:
    """Creates parameters that know their role and the logical name of each of their axes.

    Attributes:
        rngs: source of random keys.
        dtype: type the parameters are stored in.
        std: standard deviation of the normal initialisation.
        layers: length of a leading `layers` axis, for modules that are stacked and scanned.
    """

    rngs: nnx.Rngs
    dtype: DTypeLike
    std: float
    layers: int | None = None

    def stacked(self, layers: int) -> "ParamFactory":
        """The same factory for `layers` layers at once."""
        return replace(self, layers=layers)

    def wide(self) -> "ParamFactory":
        """The same factory for parameters that are float32, whatever the others are."""
        return replace(self, dtype=jnp.float32)

    def _full(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
        assert len(shape) == len(axes), (shape, axes)
        if self.layers is None:
            return shape, axes
        return (self.layers, *shape), ("layers", *axes)

    def weight(self, shape: tuple[int, ...], axes: tuple[str | None, ...], role: Role) -> nnx.Param:
        """A normally distributed weight; `axes` are logical names (see `esft_jax.sharding`)."""
        shape, axes = self._full(shape, axes)
        value = self.std * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return nnx.Param(value.astype(self.dtype), axes=axes, role=role)

    def bias(self, size: int, role: Role, experts: int | None = None) -> nnx.Param:
        """A bias, or one of each expert; zeros.

        That of a selection is float32, whatever the other parameters are.
        """
        if experts is None:
            shape, axes = self._full((size,), (None,))
        else:
            shape, axes = self._full((experts, size), ("experts", None))
        dtype = jnp.float32 if role is Role.SELECTION_BIAS else self.dtype
        return nnx.Param(jnp.zeros(shape, dtype), axes=axes, role=role)

    def scale(self, size: int, role: Role = Role.NORM, value: float = 1.0) -> nnx.Param:
        """A factor per feature, all the same at first."""
        shape, axes = self._full((size,), (None,))
        return nnx.Param(jnp.full(shape, value, self.dtype), axes=axes, role=role)
