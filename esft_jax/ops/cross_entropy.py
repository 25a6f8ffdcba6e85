"""Cross-entropy that never holds `[tokens, vocabulary]` logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Positions per chunk; logits exist for one chunk of every row at a time.
CHUNK = 256


def cross_entropy_sum(
    hidden: Float[Array, "B S D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
) -> Float[Array, ""]:
    """Sum over tokens of weight times negative log-likelihood (nats), in float32.

    Chunks run along S, so that rows stay on their devices; logits are recomputed in the backward
    pass.
    """
    length = hidden.shape[1]
    chunk = CHUNK if length % CHUNK == 0 else length

    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(x.shape[0], length // chunk, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_sum(total: Array, chunk: tuple[Array, Array, Array]) -> tuple[Array, None]:
        hidden, targets, weights = chunk
        logits = jnp.einsum(
            "bsd,dv->bsv", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
        )
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = jax.nn.logsumexp(logits, axis=-1) - chosen
        return total + jnp.sum(loss * weights), None

    total, _ = jax.lax.scan(
        chunk_sum, jnp.zeros((), jnp.float32), (split(hidden), split(targets), split(weights))
    )
    return total
