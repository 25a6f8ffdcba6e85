"""Attention on GPUs: the Triton kernels that come with JAX.

cuDNN's, behind `jax.nn.dot_product_attention`, take no keys of width 192 beside values of width
128. On CPU these run in Pallas' interpreter, for tests.
"""

from functools import partial
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.gpu.attention import BlockSizes, mha
from jaxtyping import Array, Float, Int

from esft_jax.ops.attention.operation import KEPT
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

    interpret = target_platform() == "cpu"
    options = _options(sm_scale=scale, causal=True, block_sizes=_BLOCKS, interpret=interpret)
    segments = jnp.pad(segment_ids, ((0, 0), (0, missing)))
    mixed = _causal_attention(pad(query), pad(key), pad(value), segments, options)
    return mixed[:, :length, :, :value_width]


def _options(**changed: Any) -> tuple:
    """All that `mha` takes after its arrays."""
    parameters = list(signature(mha).parameters.values())[4:]
    return tuple(changed.get(parameter.name, parameter.default) for parameter in parameters)


# As `mha`, but named is what its backward pass needs of its forward pass.
@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _causal_attention(
    query: Array, key: Array, value: Array, segment_ids: Array, options: tuple
) -> Float[Array, "B S H R"]:
    return _forward(query, key, value, segment_ids, options)[0]


def _forward(
    query: Array, key: Array, value: Array, segment_ids: Array, options: tuple
) -> tuple[Array, tuple]:
    assert mha.fwd is not None
    _, (*operands, mixed, denominators) = mha.fwd(query, key, value, segment_ids, *options)
    mixed, denominators = (checkpoint_name(x, KEPT) for x in (mixed, denominators))
    return mixed, (*operands, mixed, denominators)


def _backward(options: tuple, residuals: tuple, grad: Float[Array, "B S H R"]) -> tuple:
    assert mha.bwd is not None
    return mha.bwd(*options, residuals, grad)


_causal_attention.defvjp(_forward, _backward)
