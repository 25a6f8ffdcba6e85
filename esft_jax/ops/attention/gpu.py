"""Attention on GPUs: the Triton kernels that come with JAX.

cuDNN's, behind `jax.nn.dot_product_attention`, take no keys of width 192 beside values of width
128. On CPU these run in Pallas' interpreter, for tests.
"""

import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha
from jaxtyping import Array, Float, Int

from esft_jax.ops.platform import target_platform

# With heads of width 192, which the kernels hold as 256, larger blocks exceed shared memory.
_BLOCKS = BlockSizes(
    block_q=64, block_k=32, block_q_dkv=32, block_kv_dkv=32, block_q_dq=32, block_kv_dq=32
)


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S H R"],
    value: Float[Array, "B S H W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
) -> Float[Array, "B S H W"]:
    """As `operation.causal_attention`."""
    length, value_width = query.shape[1], value.shape[-1]
    missing = -length % _BLOCKS.block_q  # nothing earlier sees what is put behind a row
    width = max(query.shape[-1], value_width)  # the kernels know one width

    def pad(x: Array) -> Float[Array, "B _ H _"]:
        return jnp.pad(x, ((0, 0), (0, missing), (0, 0), (0, width - x.shape[-1])))

    mixed = mha(
        pad(query),
        pad(key),
        pad(value),
        jnp.pad(segment_ids, ((0, 0), (0, missing))),
        sm_scale=scale,
        causal=True,
        block_sizes=_BLOCKS,
        interpret=target_platform() == "cpu",
    )
    return mixed[:, :length, :, :value_width]
