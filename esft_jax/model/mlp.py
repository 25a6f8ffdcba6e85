"""The gated feed-forward layer of dense blocks and shared experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esft_jax.model.params import ParamFactory


def gated_silu(gate_up: Float[Array, "... F2"]) -> Float[Array, "... F"]:
    """SwiGLU's gate: `silu(gate) * up` of the two halves of the last axis."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


class MLP(nnx.Module):
    """`down(silu(gate(x)) * up(x))`; gate and up are one matrix, gate first."""

    def __init__(self, size: int, width: int, params: ParamFactory):
        self.gate_up = params.weight((size, 2 * width), ("embed", None))
        self.down = params.weight((width, size), (None, "embed"))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Apply the layer to each position."""
        hidden = gated_silu(x @ self.gate_up[...].astype(x.dtype))
        return hidden @ self.down[...].astype(x.dtype)
