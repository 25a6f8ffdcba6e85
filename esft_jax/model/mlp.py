"""The gated feed-forward layer of dense blocks and shared experts.

Letters: D model width.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from esft_jax.model.linear import project
from esft_jax.model.params import ParamFactory, Role
from esft_jax.ops.activation import Activation


class MLP(nnx.Module):
    """`down(activation(gate(x), up(x)))`; gate and up are one matrix, gate first."""

    def __init__(
        self, size: int, width: int, params: ParamFactory, role: Role, activation: Activation
    ):
        self.activation = activation
        self.gate_up = params.weight((size, 2 * width), ("embed", None), role)
        self.down = params.weight((width, size), (None, "embed"), role)
        self.lora: nnx.Dict = nnx.Dict()  # of `gate`, `up` and `down`

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the weights that rows are multiplied with."""
        return "gate_up", "down"

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Apply the layer to each position."""
        both = project(x, self, "gate_up")
        if "gate" in self.lora:
            both += jnp.concatenate([self.lora["gate"](x), self.lora["up"](x)], axis=-1)
        return project(self.activation(both), self, "down")
