"""Activations of gated feed-forward layers.

Letters: F features, F2 = 2F.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@dataclass(frozen=True)
class Activation:
    """How gate and up meet: `(up + offset) * act(gate)`; as it is by default, SwiGLU.

    Attributes:
        kind: `act(x) = x sigmoid(alpha x)` for `silu`; for `gelu_tanh`, the same with the cubic in
            the sigmoid that makes it GELU (arXiv 1606.08415).
        alpha: factor in the sigmoid.
        limit: the largest gate; `up` is kept within both signs of it. None: they have no bounds.
        offset: of `up`.
    """

    kind: Literal["silu", "gelu_tanh"] = "silu"
    alpha: float = 1.0
    limit: float | None = None
    offset: float = 0.0

    def __call__(self, gate_up: Float[Array, "... F2"]) -> Float[Array, "... F"]:
        """Of the two halves of the last axis, gate first.

        The backward pass makes everything again from them, in one pass.
        """
        return _activate(self, gate_up)

    def bounded(
        self, gate_up: Float[Array, "... F2"]
    ) -> tuple[Float[Array, "... F"], Float[Array, "... F"]]:
        """Gate, and up with its offset, within their bounds."""
        gate, up = jnp.split(gate_up, 2, axis=-1)
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate, up + self.offset if self.offset else up

    def within(self, gate_up: Float[Array, "... F2"]) -> Bool[Array, "... F2"]:
        """What `bounded` leaves as it is."""
        assert self.limit is not None
        gate, up = jnp.split(gate_up, 2, axis=-1)
        return jnp.concatenate([gate <= self.limit, jnp.abs(up) <= self.limit], axis=-1)

    def argument(self, gate: Array) -> tuple[Array, Array | float]:
        """What the sigmoid is of, and its derivative."""
        x = self.alpha * gate
        if self.kind == "silu":
            return x, self.alpha
        factor, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
        return factor * (x + cubic * x**3), self.alpha * factor * (1 + 3 * cubic * x**2)


SWIGLU = Activation()


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _activate(activation: Activation, gate_up: Array) -> Array:
    gate, up = activation.bounded(gate_up)
    return gate * jax.nn.sigmoid(activation.argument(gate)[0]) * up


def _forward(activation: Activation, gate_up: Array) -> tuple[Array, Array]:
    return _activate(activation, gate_up), gate_up


def _backward(activation: Activation, gate_up: Array, grad: Array) -> tuple[Array]:
    gate, up = activation.bounded(gate_up)
    argument, slope = activation.argument(gate)
    share = jax.nn.sigmoid(argument)
    dgate = grad * up * share * (1 + gate * slope * (1 - share))
    both = jnp.concatenate([dgate, grad * gate * share], axis=-1)
    return (both if activation.limit is None else jnp.where(activation.within(gate_up), both, 0),)


_activate.defvjp(_forward, _backward)
