"""Causal attention; how it is computed is left to an implementation.

Letters: B rows, S tokens, H heads, R query/key width, W value width. An implementation is a module
with a differentiable `causal_attention`, as below without the last argument.
"""

from importlib import import_module
from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from esft_jax.ops.platform import fastest_implementation

# Modules of this package, imported when used: kernel languages are slow to import.
Implementation = Literal["cpu", "gpu", "tpu", "xla"]

# The name, for `jax.checkpoint` policies, of what the backward pass needs of the forward pass
# beside queries, keys and values: the result, and one number per query.
KEPT = "attention"


def causal_attention(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S H R"],
    value: Float[Array, "B S H W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, "B S H W"]:
    """Attention to earlier tokens of the same segment; nothing of size `[S, S]` is ever held.

    Args:
        scale: factor of the scores before the softmax, which is computed in float32.
        implementation: how it is computed; None takes the one made for the platform that the
            surrounding mesh, or else JAX's default device, belongs to. The kernels know no
            partitioning: on a mesh, call this inside `shard_map`.

    Raises:
        ValueError: `implementation` is unknown.
    """
    if implementation is None:
        implementation = fastest_implementation()
        if implementation == "cpu" and query.dtype != jnp.float32:
            implementation = "xla"
    if implementation not in get_args(Implementation):
        known = ", ".join(get_args(Implementation))
        raise ValueError(f"attention: implementation {implementation!r} is not one of {known}")
    module = import_module(f"esft_jax.ops.attention.{implementation}")
    return module.causal_attention(query, key, value, segment_ids, scale)
