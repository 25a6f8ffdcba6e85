"""Activations and their gradients, against JAX's own derivative of what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax.ops.activation import SWIGLU, Activation

CASES = {
    "SwiGLU": (SWIGLU, lambda gate, up: jax.nn.silu(gate) * up),
    "GELU": (
        Activation("gelu_tanh"),
        lambda gate, up: jax.nn.gelu(gate, approximate=True) * up,
    ),
    "clamped": (
        Activation(alpha=1.702, limit=0.8, offset=1.0),
        lambda gate, up: (
            (jnp.clip(up, -0.8, 0.8) + 1)
            * jnp.where(gate < 0.8, gate, 0.8)
            * jax.nn.sigmoid(1.702 * jnp.where(gate < 0.8, gate, 0.8))
        ),
    ),
    "clamped GELU": (
        Activation("gelu_tanh", alpha=0.7, limit=1.1),
        lambda gate, up: (
            jnp.clip(up, -1.1, 1.1)
            * jax.nn.gelu(0.7 * jnp.where(gate < 1.1, gate, 1.1), approximate=True)
            / 0.7
        ),
    ),
}


@pytest.mark.parametrize(("activation", "said"), CASES.values(), ids=CASES)
def test_values_and_gradients(activation, said):
    rng = np.random.default_rng(0)
    both, cotangent = (jnp.asarray(rng.normal(0, 2, (7, size)), jnp.float32) for size in (10, 5))
    out, pull = jax.vjp(activation, both)
    expected, expected_pull = jax.vjp(lambda both: said(*jnp.split(both, 2, axis=-1)), both)
    np.testing.assert_allclose(out, expected, atol=1e-6)
    np.testing.assert_allclose(pull(cotangent)[0], expected_pull(cotangent)[0], atol=1e-5)


def test_the_backward_pass_keeps_nothing_but_its_input():
    activation = Activation(alpha=1.7, limit=1.0, offset=1.0)
    _, pull = jax.eval_shape(lambda both: jax.vjp(activation, both), jnp.ones((3, 8)))
    assert [leaf.shape for leaf in jax.tree.leaves(pull)] == [(3, 8)]
