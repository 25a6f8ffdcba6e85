"""A layer's experts, one by one and in pieces, against all assignments at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax.moe.experts import apply_experts
from esft_jax.moe.grouped_matmul import Bank
from esft_jax.moe.weights import ExpertWeights, TunedWindow
from esft_jax.ops.activation import Activation

T, K, D, F = 20, 3, 8, 6
# Of 10 experts the device has the base of 3 to 6. Of its tuned ones, 9 has its base elsewhere.
E, W, FIRST, MODEL = 4, 3, 3, 10
TUNED = {4: 1, 6: 0, 9: 2}
MATRICES = {"gate_up": (D, 2 * F), "down": (F, D)}
BIASES = {"gate_up_bias": (2 * F,), "down_bias": (D,)}
# By whether experts have biases. Many gates and ups are past the limit.
ACTIVATIONS = {False: Activation(), True: Activation(alpha=1.7, limit=1.5, offset=1.0)}


def normal(seed, shapes):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=shape), jnp.float32) for n, shape in shapes.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "biased"])
def leaves(request):
    """Shapes of what an expert has."""
    return MATRICES | BIASES if request.param else MATRICES


@pytest.fixture(scope="module")
def arrays(leaves):
    rows = {name: (W, *shape) for name, shape in leaves.items()}
    return normal(0, {"x": (T, D), "gates": (T, K)} | rows)


@pytest.fixture(scope="module")
def base(leaves):
    of_two_layers = {name: (2, E, *shape) for name, shape in leaves.items()}
    return ExpertWeights(**normal(1, of_two_layers))


def choices(kind):
    ids = np.random.default_rng(2).integers(0, MODEL + 1, (T, K))  # most are not computed here
    own = np.array([3, 4, 5, 6, 9])
    return {"some": ids, "all": own[ids % 5], "one expert": ids * 0 + 4, "none": ids * 0 + 1}[kind]


def window(arrays):
    base = {FIRST + i: W + i for i in range(E)}
    groups = jnp.array([(base | TUNED).get(expert, W + E) for expert in range(MODEL + 1)])
    weights = {name: bank for name, bank in arrays.items() if name in MATRICES | BIASES}
    return TunedWindow(ExpertWeights(**weights), groups)


def apply(arrays, base, ids, piece):
    own = base.map(lambda stack: Bank.layer_of(stack, 1))
    tokens = arrays["x"], jnp.asarray(ids), arrays["gates"]
    activation = ACTIVATIONS[base.down_bias is not None]
    return apply_experts(*tokens, own, window(arrays), activation, FIRST, piece)


def run(arrays, base, ids, piece):
    def loss(arrays):
        out = apply(arrays, base, ids, piece)
        return (out**2).sum(), out

    return jax.jit(jax.grad(loss, has_aux=True))(arrays)


def test_each_expert_is_taken_from_where_it_is(arrays, base):
    ids = choices("some")
    expected = np.zeros((T, D))
    for token, k in np.ndindex(T, K):
        expert = ids[token, k]
        if expert in TUNED:
            own = window(arrays).weights.map(lambda bank, row=TUNED[expert]: bank[row])
        elif FIRST <= expert < FIRST + E:
            own = base.map(lambda bank, place=expert - FIRST: bank[1, place])
        else:
            continue
        both = arrays["x"][token] @ own.gate_up
        if own.down_bias is None:
            gate, up = jnp.split(both, 2)
            out = (jax.nn.silu(gate) * up) @ own.down
        else:
            gate, up = jnp.split(both + own.gate_up_bias, 2)
            gate, up = jnp.minimum(gate, 1.5), jnp.clip(up, -1.5, 1.5)
            out = (gate * jax.nn.sigmoid(1.7 * gate) * (up + 1)) @ own.down + own.down_bias
        expected[token] += arrays["gates"][token, k] * out
    np.testing.assert_allclose(run(arrays, base, ids, None)[1], expected, atol=1e-4)


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
            return apply(given, base, choices("all"), 30).sum()

        program = str(jax.make_jaxpr(jax.grad(loss))({name: arrays[name] for name in wanted}))
        return program.count("dot_general") + program.count("ffi_call")

    everything = products([*arrays])
    assert products(["gate_up", "down"]) < everything
    assert products(["x"]) < everything


def test_nothing_wide_is_as_long_as_the_assignments(arrays, base):
    def text(piece):
        lowered = jax.jit(lambda a: run(a, base, choices("some"), piece)).lower(arrays)
        return lowered.compile().as_text()

    for width in (D, 2 * F):
        assert f"f32[{T * K},{width}]" in text(None)
        assert f"f32[{T * K},{width}]" not in text(7)
