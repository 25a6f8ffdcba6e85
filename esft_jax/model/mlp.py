"""The gated feed-forward layer of dense blocks and shared experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esft_jax.model.lora import project
from esft_jax.model.params import ParamFactory, Role


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


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, gate first."""

    def __init__(self, size: int, width: int, params: ParamFactory, role: Role):
        self.gate_up = params.weight((size, 2 * width), ("embed", None), role)
        self.down = params.weight((width, size), (None, "embed"), role)
        self.lora: nnx.Dict = nnx.Dict()  # of `gate`, `up` and `down`

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Apply the layer to each position."""
        both = project(x, self, "gate_up")
        if "gate" in self.lora:
            both += jnp.concatenate([self.lora["gate"](x), self.lora["up"](x)], axis=-1)
        return project(gated_silu(both), self, "down")
