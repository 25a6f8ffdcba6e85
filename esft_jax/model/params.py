"""Parameter creation: values, names of their axes, and the leading layer axis."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


@dataclass(frozen=True)
class ParamFactory:
    """Creates parameters that know the logical name of each of their axes.

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
        return ParamFactory(self.rngs, self.dtype, self.std, layers)

    def _full(
        self, shape: tuple[int, ...], axes: tuple[str | None, ...]
    ) -> tuple[tuple[int, ...], tuple[str | None, ...]]:
        assert len(shape) == len(axes), (shape, axes)
        if self.layers is None:
            return shape, axes
        return (self.layers, *shape), ("layers", *axes)

    def weight(self, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
        """A normally distributed weight; `axes` are logical names (see `esft_jax.mesh`)."""
        shape, axes = self._full(shape, axes)
        value = self.std * jax.random.normal(self.rngs.params(), shape, jnp.float32)
        return nnx.Param(value.astype(self.dtype), axes=axes)

    def scale(self, size: int) -> nnx.Param:
        """A norm's per-feature scale, ones."""
        shape, axes = self._full((size,), (None,))
        return nnx.Param(jnp.ones(shape, self.dtype), axes=axes)
