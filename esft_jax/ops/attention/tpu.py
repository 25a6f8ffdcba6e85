"""Attention on TPUs: the splash attention kernels that come with JAX.

A block of scores that causality hides is neither computed nor fetched. Query/key and value widths
may differ.

Letters: B rows, S tokens of each, H query heads, G heads of keys and values, R and W features of a
key and of a value.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from esft_jax.ops.attention.operation import KEPT

# Queries and keys per block; the first that divides the row, which is padded for the last one.
BLOCKS = (512, 256, 128)
# Longer blocks than the window have more scores that no query sees. Smaller ones than this would,
# by an estimate, take longer to start than to compute.
SMALLEST_FOR_WINDOW = 256


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S G R"],
    value: Float[Array, "B S G W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H W"]:
    """As `operation.causal_attention`."""
    own_length, heads = query.shape[1:3]
    missing = -own_length % BLOCKS[-1]  # nothing earlier sees what is put behind a row
    length = own_length + missing
    largest = max(BLOCKS[0] if window is None else window, SMALLEST_FOR_WINDOW)
    block = next(size for size in BLOCKS if length % size == 0 and size <= largest)

    def heads_first(x: Array) -> Float[Array, "B H _ _"]:
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, 0))).swapaxes(1, 2)

    seen = None if window is None else window - 1  # tokens before a query's own
    mask = masks.LocalMask((length, length), (seen, 0), 0)
    kernel = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name=KEPT,
    )
    segments = jnp.pad(segment_ids, ((0, 0), (0, missing)))
    mixed = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(
        heads_first(query * scale),
        heads_first(key),
        heads_first(value),
        splash.SegmentIds(segments, segments),
        None if sinks is None else _with_float32_gradient(sinks),
    )
    return mixed.swapaxes(1, 2)[:, :own_length]


@jax.custom_vjp
def _with_float32_gradient(sinks: Float[Array, " H"]) -> Float[Array, " H"]:
    """The kernel of JAX 0.10 gives sinks a gradient in the type of the queries."""
    return sinks


_with_float32_gradient.defvjp(
    lambda sinks: (sinks, None), lambda _, grad: (grad.astype(jnp.float32),)
)
