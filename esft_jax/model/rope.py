"""Rotary position embedding, with YaRN (arXiv 2104.09864, 2309.00071).

Letters: B rows, S tokens of each, H heads, R features of each, P pairs of these.
"""

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esft_jax.model.config import RopeConfig


def inverse_frequencies(config: RopeConfig) -> np.ndarray:
    """Radians per position of each of the `rotated / 2` pairs, float32 `[rotated / 2]`.

    YaRN keeps the fast pairs, divides the slow ones by `factor`, and blends linearly between
    the pairs that turn `beta_fast` and `beta_slow` times within the original context.
    """
    size, yarn = config.rotated, config.yarn
    plain = config.theta ** (-np.arange(0, size, 2, dtype=np.float64) / size)
    if config.turning is not None:
        plain[config.turning :] = 0
    if yarn is None:
        return plain.astype(np.float32)

    def pair_with_rotations(rotations: float) -> float:
        context = yarn.original_context
        return size * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.theta))

    low, high = pair_with_rotations(yarn.beta_fast), pair_with_rotations(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    # Below 0 where all pairs are on one side of the bounds, which keeps or divides all of them.
    span = (high - low) or 0.001
    interpolated = np.clip((np.arange(size // 2) - low) / span, 0, 1)
    return (plain * (1 - interpolated) + plain / yarn.factor * interpolated).astype(np.float32)


def rotation(
    config: RopeConfig, positions: Int[Array, "B S"]
) -> tuple[Float[Array, "B S P"], Float[Array, "B S P"]]:
    """Cosine and sine of every pair (P = rotated / 2) at every position, float32."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config)
    return config.rotation_scale * jnp.cos(angles), config.rotation_scale * jnp.sin(angles)


def rotate(
    x: Float[Array, "B S H R"],
    cos: Float[Array, "B S P"],
    sin: Float[Array, "B S P"],
    pairing: Literal["interleaved", "half"],
) -> Float[Array, "B S H R"]:
    """Turn the first 2P features of every head, in float32; others pass (R >= 2P).

    Pairs are `(x[2i], x[2i + 1])`, interleaved, or `(x[i], x[i + P])`, by halves.
    """
    turning = 2 * cos.shape[-1]
    wide = x[..., :turning].astype(jnp.float32)
    if pairing == "interleaved":
        wide = wide.reshape(*x.shape[:-1], -1, 2)
        first, second = wide[..., 0], wide[..., 1]
    else:
        first, second = jnp.split(wide, 2, axis=-1)
    cos, sin = cos[:, :, None], sin[:, :, None]
    turned = first * cos - second * sin, first * sin + second * cos
    if pairing == "interleaved":
        found = jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], turning)
    else:
        found = jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([found.astype(x.dtype), x[..., turning:]], axis=-1)
