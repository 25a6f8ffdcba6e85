"""Root-mean-square normalisation.

Letters: D width of what is normalised.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esft_jax.model.config import NormConfig
from esft_jax.model.params import ParamFactory


def normalise(x: Float[Array, "... D"], eps: float) -> Float[Array, "... D"]:
    """`x / rms(x)` over the last axis, float32."""
    wide = x.astype(jnp.float32)
    return wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + eps)


class RMSNorm(nnx.Module):
    """`scale * x / rms(x)`, statistics in float32 (arXiv 1910.07467).

    With `offset`, the parameter is what the scale has over 1, and the product is in float32, too.
    """

    def __init__(self, size: int, config: NormConfig, params: ParamFactory):
        self.scale = params.scale(size, value=0.0 if config.offset else 1.0)
        self.config = config

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        wide = normalise(x, self.config.eps)
        if self.config.offset:
            return (wide * (1 + self.scale[...].astype(jnp.float32))).astype(x.dtype)
        return self.scale[...].astype(x.dtype) * wide.astype(x.dtype)
