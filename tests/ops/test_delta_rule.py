"""The gated delta rule and the convolution before it, against the same one token at a time."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax.ops.causal_convolution import causal_convolution
from esft_jax.ops.delta_rule import CHUNK, STRETCH, gated_delta_rule
from esft_jax.planning.operations import KernelRows, count_operations


def make_inputs(rows, length, key_heads, shared, width, value_width, fading=0.3):
    """Packed documents whose keys are alike, with decays from nearly none to nearly all."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(rows, *shape)), jnp.float32)

    heads = key_heads * shared
    query, key = (normal(length, key_heads, width) + 0.7 for _ in range(2))
    decay = -fading * jnp.exp(2 * normal(length, heads))
    beta = jax.nn.sigmoid(3 * normal(length, heads))
    state = normal(heads, width, value_width)
    segments = np.sort(rng.integers(1, 4, (rows, length)), axis=1)
    if length > 20:
        segments[0, -5:] = 0  # behind the documents, within one, and before them
        segments[-1, 7:10] = 0
        segments[-1, :2] = 0
    value = normal(length, heads, value_width)
    return (query, key, value, decay, beta, state), jnp.asarray(segments, jnp.int32)


def one_by_one(query, key, value, decay, beta, state, segments):
    """As the definition has it."""
    shared = value.shape[2] // key.shape[2]

    def unit(x):
        return x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)

    query = jnp.repeat(unit(query) * query.shape[-1] ** -0.5, shared, axis=2)
    key = jnp.repeat(unit(key), shared, axis=2)

    def step(carry, token):
        before, document = carry
        query, key, value, decay, beta, segment = token
        real = segment > 0
        new = real & (segment != document) & (document > 0)
        state = jnp.where(new[:, None, None, None], 0, before)
        state = state * jnp.exp(decay)[..., None, None]
        wrong = value - jnp.einsum("bhr,bhrw->bhw", key, state)
        state += key[..., None] * (beta[..., None] * wrong)[:, :, None]
        state = jnp.where(real[:, None, None, None], state, before)
        read = jnp.einsum("bhr,bhrw->bhw", query, state)
        return (state, jnp.where(real, segment, document)), read

    tokens = [jnp.moveaxis(x, 1, 0) for x in (query, key, value, decay, beta, segments)]
    (state, _), out = jax.lax.scan(step, (state, jnp.zeros(len(key), jnp.int32)), tuple(tokens))
    return jnp.moveaxis(out, 0, 1), state


def in_chunks(query, key, value, decay, beta, state, segments):
    return gated_delta_rule(query, key, value, decay, beta, segments, state)


def results(rule, inputs, segments):
    """What real tokens read, the last state, and gradients of the sum of both times something."""
    real = (segments > 0)[..., None, None]

    def loss(*inputs):
        out, state = rule(*inputs, segments)
        out = jnp.where(real, out, 0)
        rng = np.random.default_rng(1)
        total = sum((x * rng.normal(size=x.shape)).sum() for x in (out, state))
        return total, (out, state)

    return jax.jit(jax.grad(loss, tuple(range(len(inputs))), has_aux=True))(*inputs)


@pytest.mark.parametrize(
    "size",
    [
        (2, 1, 1, 2, 6, 4),
        (2, 5, 2, 1, 6, 4),
        (2, CHUNK * 3 + 9, 2, 3, 12, 10),
        (1, CHUNK * (STRETCH + 1) - 3, 1, 1, 8, 6),
        (1, 4096, 1, 2, 24, 16, 0.01),
    ],
    ids=str,
)
def test_chunks_are_the_recurrence(size):
    inputs, segments = make_inputs(*size)
    found, wanted = (results(rule, inputs, segments) for rule in (in_chunks, one_by_one))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))


def test_a_packed_document_is_as_it_is_alone():
    (*tokens, _), _ = make_inputs(1, 200, 2, 2, 12, 10)
    begins = [0, 3, 90, 91, 200]
    segments = jnp.asarray(np.repeat([1, 2, 3, 1], np.diff(begins))[None])

    def found(tokens, segments):
        def loss(*tokens):
            out, _ = gated_delta_rule(*tokens, segments)
            return (out**2).sum(), out

        return jax.grad(loss, tuple(range(len(tokens))), has_aux=True)(*tokens)

    packed = found(tokens, segments)
    for begin, end in itertools.pairwise(begins):
        own = slice(begin, end)
        alone = found([x[:, own] for x in tokens], segments[:, own])
        for one, other in zip(jax.tree.leaves(packed), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(one[:, own], other, atol=1e-5)


def test_a_row_goes_on_from_a_state():
    (*tokens, state), _ = make_inputs(2, 150, 1, 2, 8, 6)
    ones = jnp.ones((2, 150), jnp.int32)
    whole, last = gated_delta_rule(*tokens, ones, state)
    cut, parts = 70, []
    for part in (slice(0, cut), slice(cut, None)):
        out, state = gated_delta_rule(*(x[:, part] for x in tokens), ones[:, part], state)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-5)
    np.testing.assert_allclose(state, last, atol=1e-5)


def test_equal_keys_and_lasting_memory_stay_exact():
    """Powers of the triangular matrix would overflow here; sums of decays would lose the small."""
    (query, key, value, decay, beta, state), _ = make_inputs(1, 128, 1, 1, 8, 6)
    key, beta = jnp.broadcast_to(key[:, :1], key.shape), jnp.ones_like(beta)
    decay = jnp.where(jnp.arange(128)[None, :, None] % 64 < 40, -120.0, -1e-3)
    ones = jnp.ones((1, 128), jnp.int32)
    found = in_chunks(query, key, value, decay, beta, state, ones)
    wanted = one_by_one(query, key, value, decay, beta, state, ones)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(other).max())


def test_bfloat16_is_off_by_about_its_own_rounding():
    (query, key, value, decay, beta, state), segments = make_inputs(2, 150, 1, 2, 12, 10)
    query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))
    found, _ = in_chunks(query, key, value, decay, beta, state, segments)
    wanted, _ = one_by_one(
        *(x.astype(jnp.float32) for x in (query, key, value)), decay, beta, state, segments
    )
    assert found.dtype == jnp.bfloat16
    error = jnp.where((segments > 0)[..., None, None], found - wanted, 0)
    assert np.sqrt(np.mean(error**2) / np.mean(wanted**2)) < 5e-3


LONG = (1, 4096, 4, 2, 128, 128)


def gradients(query, key, value, decay, beta):
    def loss(*tokens):
        segments = jnp.ones(tokens[0].shape[:2], jnp.int32)
        return gated_delta_rule(*tokens, segments)[0].sum()

    return jax.grad(loss, (0, 1, 2, 3, 4))(query, key, value, decay, beta)


def long_row():
    inputs, _ = jax.eval_shape(lambda: make_inputs(*LONG))
    return inputs[:-1]


@pytest.mark.parametrize("backward", [False, True])
def test_operations_are_those_of_the_algorithm(backward):
    rows, length, key_heads, shared, width, value_width = LONG
    one = 2 * CHUNK
    # Of a chunk and value head: products of keys with keys and with queries; the inverse; what the
    # state says of keys and queries, and what it gains; corrections, and what queries take of them.
    inverse = one * CHUNK**2 / 3
    state, within = one * width * value_width, one * CHUNK * value_width
    algorithm = 2 * one * CHUNK * width / shared + inverse + 3 * state + 2 * within
    algorithm *= rows * key_heads * shared * length / CHUNK
    if backward:  # two products for each of the forward pass
        algorithm *= 3

    def forward(*tokens):
        return gated_delta_rule(*tokens, jnp.ones((rows, length), jnp.int32))[0]

    traced = jax.jit(gradients if backward else forward).trace(*long_row())
    found = count_operations(traced.jaxpr.jaxpr, KernelRows(np.array([1]), 0), 1).products
    assert found < 1.3 * algorithm


def test_the_backward_pass_keeps_tokens_and_a_state_per_stretch():
    rows, length, key_heads, shared, width, value_width = LONG

    def kept(*tokens):
        segments = jnp.ones((rows, length), jnp.int32)
        return jax.vjp(lambda *t: gated_delta_rule(*t, segments)[0], *tokens)[1]

    found = sum(x.size for x in jax.tree.leaves(jax.eval_shape(kept, *long_row())))
    tokens = sum(x.size for x in long_row())
    states = rows * length // (CHUNK * STRETCH) * key_heads * shared * width * value_width
    assert found < 1.02 * (tokens + states)  # and numbers per token


@pytest.mark.usefixtures("unchecked")
def test_heads_that_do_not_fit_are_refused():
    (query, key, value, decay, beta, _), segments = make_inputs(1, 4, 2, 2, 6, 4)
    with pytest.raises(ValueError, match=r"key \(1, 4, 2, 6\), value \(1, 4, 3, 4\); expected"):
        gated_delta_rule(query, key, value[:, :, :3], decay, beta, segments)
    with pytest.raises(ValueError, match=r"query \(1, 4, 1, 6\), key \(1, 4, 2, 6\)"):
        gated_delta_rule(query[:, :, :1], key, value, decay, beta, segments)


def convolved(x, weight):
    taps = len(weight)
    x = np.concatenate([np.zeros((taps - 1, x.shape[1])), x])
    return np.array([(x[t : t + taps] * weight).sum(axis=0) for t in range(len(x) - taps + 1)])


@pytest.mark.parametrize("lengths", [(7, 1, 2, 5), (3,), (1, 9)])
def test_a_convolution_sees_its_document_only(lengths):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(sum(lengths), 3)), rng.normal(size=(4, 3))
    segments = np.repeat(1 + np.arange(len(lengths)), lengths)[None]
    out, after = causal_convolution(*map(jnp.float32, (x[None], weight)), jnp.asarray(segments))
    parts = np.split(x, np.cumsum(lengths)[:-1])
    expected = np.concatenate([convolved(part, weight) for part in parts])
    np.testing.assert_allclose(out[0], expected, atol=1e-6)
    last = np.concatenate([np.zeros((3, 3)), parts[-1]])[-3:]
    np.testing.assert_allclose(after[0], last, atol=1e-6)


def test_a_convolution_goes_on_over_padding():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 12, 3)), jnp.float32(rng.normal(size=(4, 3)))
    lengths = np.array([[5, 2], [1, 6], [4, 0]])  # of the real tokens of both rows, block by block
    before, begins = None, np.zeros(2, int)
    for counts in lengths:
        block = np.full((2, lengths.max(), 3), np.nan)
        for row, count in enumerate(counts):
            block[row, :count] = x[row, begins[row] : begins[row] + count]
        keep = np.arange(lengths.max()) < counts[:, None]
        block = jnp.float32(np.where(keep[..., None], block, 9.0))
        out, before = causal_convolution(block, weight, jnp.asarray(keep, jnp.int32), before)
        for row, count in enumerate(counts):
            expected = convolved(x[row], weight)[begins[row] : begins[row] + count]
            np.testing.assert_allclose(out[row, :count], expected, atol=1e-6)
        begins += counts
