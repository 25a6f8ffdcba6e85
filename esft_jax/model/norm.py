"""Root-mean-square normalisation.

Letters: D width of what is normalised.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esft_jax.model.params import ParamFactory


class RMSNorm(nnx.Module):
    """`scale * x / rms(x)`, statistics in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, params: ParamFactory):
        self.scale = params.scale(size)
        self.eps = eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalise the last axis."""
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return self.scale[...].astype(x.dtype) * wide.astype(x.dtype)
