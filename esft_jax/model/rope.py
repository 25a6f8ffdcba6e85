"""Rotary position embedding on interleaved pairs, with YaRN (arXiv 2104.09864, 2309.00071)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esft_jax.model.config import RopeConfig


def inverse_frequencies(config: RopeConfig, dim: int) -> np.ndarray:
    """Radians per position of each of the `dim / 2` pairs, float32 `[dim / 2]`.

    YaRN keeps the fast pairs, divides the slow ones by `factor`, and blends linearly between
    the pairs that turn `beta_fast` and `beta_slow` times within the original context.
    """
    plain = config.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.factor is None:
        return plain.astype(np.float32)

    def pair_with_rotations(rotations: float) -> float:
        return (
            dim
            * math.log(config.original_context / (rotations * 2 * math.pi))
            / (2 * math.log(config.theta))
        )

    low = max(math.floor(pair_with_rotations(config.beta_fast)), 0)
    high = min(math.ceil(pair_with_rotations(config.beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    interpolated = np.clip((np.arange(dim // 2) - low) / span, 0, 1)
    return (plain * (1 - interpolated) + plain / config.factor * interpolated).astype(np.float32)


def rotation(
    config: RopeConfig, dim: int, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S P"], Float[Array, "B S P"]]:
    """Cosine and sine of every pair (P = dim / 2) at every position, float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config, dim)
    return config.rotation_scale * jnp.cos(angles), config.rotation_scale * jnp.sin(angles)


def rotate(
    x: Float[Array, "B S H R"], cos: Float[Array, "B S P"], sin: Float[Array, "B S P"]
) -> Float[Array, "B S H R"]:
    """Turn the pairs `(x[2i], x[2i + 1])` (R = 2P) of every head, in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
