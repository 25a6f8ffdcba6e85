"""Attention over packed documents, in one piece and in blocks of queries."""

import jax
import numpy as np
import pytest

from esft_jax.ops import attention

B, S, H, R, W = 2, 24, 2, 4, 3
SCALE = 0.7


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(B, S, H, w)).astype(np.float32) for w in (R, R, W))
    # Documents that straddle blocks, and padding that fills whole ones.
    segments = np.array([[1] * 11 + [2] * 13, [1] * 5 + [2] * 2 + [0] * 17], np.int32)
    return query, key, value, segments


def run(inputs):
    *arrays, segments = inputs

    def loss(*arrays):
        out = attention.causal_attention(*arrays, segments, SCALE)
        return (out**2).sum(), out

    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*arrays)


def test_attention_sees_earlier_tokens_of_its_document(inputs):
    query, key, value, segments = inputs
    expected = np.zeros((B, S, H, W))
    for b, s, h in np.ndindex(B, S, H):
        seen = [t for t in range(s + 1) if segments[b, t] == segments[b, s]]
        weights = np.exp(SCALE * key[b, seen, h].astype(np.float64) @ query[b, s, h])
        expected[b, s, h] = weights @ value[b, seen, h] / weights.sum()
    np.testing.assert_allclose(run(inputs)[1], expected, atol=1e-5)


def test_blocks_of_queries_change_nothing(inputs, monkeypatch):
    whole = run(inputs)
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 8)
    blocks = run(inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), blocks, whole)


def test_the_gradient_holds_scores_of_one_block_at_a_time(inputs, monkeypatch):
    monkeypatch.setattr(attention, "SMALLEST_BLOCK", 8)
    monkeypatch.setattr(attention, "BLOCKS", 3)
    program = str(jax.make_jaxpr(run)(inputs))
    for keys in (8, 16, 24):  # no block meets keys after its last query
        assert f"f32[2,2,8,{keys}]" in program
    assert "[2,2,24,24]" not in program


def test_a_query_that_sees_nothing_is_finite(inputs):
    query, key, value, _ = inputs
    out = jax.jit(attention.masked_attention, static_argnums=4)(
        query, key, value, np.zeros((B, S, S), bool), SCALE
    )
    assert np.isfinite(out).all()
