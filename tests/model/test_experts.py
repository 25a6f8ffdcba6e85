"""A layer's experts in pieces, against all assignments at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax.model.experts import apply_experts
from esft_jax.model.tuned import TunedWindow

T, K, E, D, F, W = 20, 3, 4, 8, 6, 2


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    shapes = {"x": (T, D), "gates": (T, K), "gate_up": (W, D, 2 * F), "down": (W, F, D)}
    return {n: jnp.asarray(rng.normal(size=shape), jnp.float32) for n, shape in shapes.items()}


@pytest.fixture(scope="module")
def base():
    rng = np.random.default_rng(1)
    shapes = ((2, E, D, 2 * F), (2, E, F, D))  # of two layers
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def choices(kind):
    ids = np.random.default_rng(2).integers(-2, E + 5, (T, K))  # most are nobody's
    return {"some": ids, "all": ids % E, "one expert": ids * 0 + 1, "none": ids * 0 - 1}[kind]


def run(arrays, base, ids, piece):
    slots = jnp.array([-1, 1, -1, 0])

    def loss(arrays):
        tuned = TunedWindow(arrays["gate_up"], arrays["down"], slots)
        out = apply_experts(arrays["x"], ids, arrays["gates"], *base, jnp.array(1), tuned, piece)
        return (out**2).sum(), out

    return jax.jit(jax.grad(loss, has_aux=True))(arrays)


@pytest.mark.parametrize("kind", ["some", "all", "one expert", "none"])
@pytest.mark.parametrize("piece", [7, 30, T * K])
def test_pieces_change_nothing(arrays, base, kind, piece):
    ids = choices(kind)
    whole, pieces = run(arrays, base, ids, None), run(arrays, base, ids, piece)
    for one, other in zip(jax.tree.leaves(pieces), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(other).max(), 1))
    if kind != "none":
        assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(whole))


def test_only_asked_for_gradients_are_computed(arrays, base):
    def products(wanted):
        def loss(some):
            given = arrays | some
            tuned = TunedWindow(given["gate_up"], given["down"], jnp.array([-1, 1, -1, 0]))
            ids, layer = choices("all"), jnp.array(1)
            return apply_experts(given["x"], ids, given["gates"], *base, layer, tuned, 30).sum()

        program = str(jax.make_jaxpr(jax.grad(loss))({name: arrays[name] for name in wanted}))
        return program.count("dot_general")

    everything = products(["x", "gates", "gate_up", "down"])
    assert products(["gate_up", "down"]) < everything
    assert products(["x"]) < everything


def test_nothing_wide_is_as_long_as_the_assignments(arrays, base):
    def text(piece):
        lowered = jax.jit(lambda a: run(a, base, choices("some"), piece)).lower(arrays)
        return lowered.compile().as_text()

    for width in (D, 2 * F):
        assert f"f32[{T * K},{width}]" in text(None)
        assert f"f32[{T * K},{width}]" not in text(7)
