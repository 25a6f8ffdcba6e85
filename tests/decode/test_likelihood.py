import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esft_jax.decode import likelihood
from esft_jax.decode.likelihood import continuation_likelihoods
from esft_jax.errors import InputError
from esft_jax.sharding import make_mesh
from tests.decode.test_generation import CONFIG, VOCABULARY, random_model

RNG = np.random.default_rng(0)
LIMIT = 30
# Of context and of continuation; the last two do not fit the limit.
LENGTHS = [(1, 1), (3, 2), (5, 20), (1, 30), (17, 1), (2, 2), (40, 3), (12, 29)]
PAIRS = [
    (RNG.integers(1, VOCABULARY, a).tolist(), RNG.integers(1, VOCABULARY, b).tolist())
    for a, b in LENGTHS
]


@pytest.fixture(scope="module")
def expected():
    """From the logits of each pair alone."""
    graph, params = nnx.split(random_model(7))
    forward = jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens).logits)
    found = []
    for context, continuation in PAIRS:
        ids = [*context, *continuation][-(LIMIT + 1) :]
        read = len(ids) - 1
        # Causal: what is put behind a row changes nothing in it.
        logits = forward(params, np.pad([ids[:-1]], ((0, 0), (0, LIMIT - read))))[0]
        logs = jax.nn.log_softmax(logits)[read - len(continuation) : read]
        total = sum(float(row[token]) for row, token in zip(logs, continuation, strict=True))
        found.append((total, logs.argmax(axis=1).tolist() == continuation))
    return found


def check(found, expected):
    np.testing.assert_allclose([v for v, _ in found], [v for v, _ in expected], rtol=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("chunk", [64, 7])
def test_each_pair_is_scored_as_if_alone(expected, monkeypatch, chunk):
    monkeypatch.setattr(likelihood, "_CHUNK", chunk)
    likelihood._likelihoods.clear_cache()
    done = []
    found = continuation_likelihoods(
        random_model(7), PAIRS, batch_size=3, max_length=LIMIT, advance=done.append
    )
    check(found, expected)
    assert done == [3, 3, 2]


def test_a_mesh_changes_nothing(expected):
    mesh = make_mesh(2, 2, jax.devices()[:4])
    check(
        continuation_likelihoods(random_model(7, mesh), PAIRS, batch_size=3, max_length=LIMIT),
        expected,
    )


def test_greedy_continuations_are_recognised():
    model = random_model(7)
    first = int(model(jnp.array([[1, 2, 3]])).logits[0, -1].argmax())
    second = int(model(jnp.array([[1, 2, 3, first]])).logits[0, -1].argmax())
    pairs = [([1, 2, 3], [first, second]), ([1, 2, 3], [first, (second + 1) % VOCABULARY])]
    assert [greedy for _, greedy in continuation_likelihoods(model, pairs)] == [True, False]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([], [1]), "pair 1: expected a token of context and of continuation"),
        (([1], []), "pair 1: expected a token of context and of continuation"),
        (([1], [2] * 41), "pair 1: a continuation of 41 tokens; expected at most 40"),
    ],
)
def test_bad_pairs_are_named(pair, message):
    assert CONFIG.max_positions == 40
    with pytest.raises(InputError, match=message):
        continuation_likelihoods(random_model(7), [([1], [2]), pair])
