"""Activations of feed-forward layers.

Letters: F features, F2 = 2F.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def gated_silu(gate_up: Float[Array, "... F2"]) -> Float[Array, "... F"]:
    """SwiGLU's gate: `silu(gate) * up` of the two halves of the last axis.

    The backward pass makes everything again from them, in one pass.
    """
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _gated_silu_forward(gate_up: Array) -> tuple[Array, Array]:
    return gated_silu(gate_up), gate_up


def _gated_silu_backward(gate_up: Array, grad: Array) -> tuple[Array]:
    gate, up = jnp.split(gate_up, 2, axis=-1)
    share = jax.nn.sigmoid(gate)
    dgate = grad * up * share * (1 + gate * (1 - share))
    return (jnp.concatenate([dgate, grad * gate * share], axis=-1),)


gated_silu.defvjp(_gated_silu_forward, _gated_silu_backward)
