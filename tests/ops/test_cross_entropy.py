"""The chunked loss against a plain log-softmax."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from esft_jax.ops.cross_entropy import CHUNK, cross_entropy_sums
from esft_jax.sharding import RULES, make_mesh

B, S, D, V = 2, 2 * CHUNK, 8, 203


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    weights = rng.uniform(0, 2, (B, S)).astype(np.float32)
    weights[:, ::3] = 0
    return {
        "hidden": rng.normal(size=(B, S, D)).astype(np.float32),
        "head": rng.normal(size=(D, V)).astype(np.float32),
        "targets": rng.integers(0, V, (B, S)).astype(np.int32),
        "weights": weights,
    }


@jax.jit
def ours(hidden, head, targets, weights):
    # A factor, so that a backward pass that ignores its cotangent shows.
    return jax.value_and_grad(
        lambda h, w: 3 * cross_entropy_sums(h, w, targets, weights)[0], argnums=(0, 1)
    )(hidden, head)


def plain(hidden, head, targets, weights):
    """Value and gradients in float64 numpy."""
    hidden, head = hidden.astype(np.float64), head.astype(np.float64)
    exps = np.exp(hidden @ head)
    probs = exps / exps.sum(axis=-1, keepdims=True)
    onehot = np.eye(head.shape[1])[targets]
    value = -3 * np.sum(weights * np.log((probs * onehot).sum(axis=-1)))
    dlogits = 3 * weights[..., None] * (probs - onehot)
    return value, (dlogits @ head.T, np.einsum("bsd,bsv->dv", hidden, dlogits))


def close(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(
            np.asarray(one, np.float64) / scale, other / scale, atol=tolerance, rtol=0
        )


def test_value_and_gradients(inputs):
    close(ours(**inputs), plain(**inputs), 1e-5)


def test_logits_may_have_a_soft_bound(inputs):
    cap, names = 1.5, ("hidden", "targets", "weights")  # logits go far past it
    short = inputs | {key: inputs[key][:, :10] for key in names}
    hidden, head, targets, weights = (np.asarray(short[n], np.float64) for n in inputs)

    def expected(hidden, head):
        logits = cap * np.tanh(hidden @ head / cap)
        exps = np.exp(logits)
        probs = exps / exps.sum(axis=-1, keepdims=True)
        onehot = np.eye(V)[targets.astype(int)]
        dlogits = weights[..., None] * (probs - onehot) * (1 - (logits / cap) ** 2)
        value = -np.sum(weights * np.log((probs * onehot).sum(axis=-1)))
        return value, (dlogits @ head.T, np.einsum("bsd,bsv->dv", hidden, dlogits))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def found(hidden, head):
        return cross_entropy_sums(hidden, head, short["targets"], short["weights"], cap=cap)[0]

    close(found(short["hidden"], short["head"]), expected(hidden, head), 1e-5)


def test_a_length_that_is_no_multiple_of_the_chunk(inputs):
    short = inputs | {key: inputs[key][:, :10] for key in ("hidden", "targets", "weights")}
    close(ours(**short), plain(**short), 1e-5)


def test_large_logits_do_not_overflow(inputs):
    inputs = inputs | {"hidden": inputs["hidden"][:, :10] * 300}
    inputs |= {key: inputs[key][:, :10] for key in ("targets", "weights")}
    value, grads = ours(**inputs)
    assert all(np.isfinite(x).all() for x in (value, *grads))


def test_bfloat16(inputs):
    low = inputs | {key: inputs[key].astype(jnp.bfloat16) for key in ("hidden", "head")}
    value, grads = ours(**low)
    assert value.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
    close((value, grads), plain(**low), 2**-7)


def test_no_weight_no_loss(inputs):
    value, grads = ours(**inputs | {"weights": np.zeros((B, S), np.float32)})
    assert value == 0 and not any(g.any() for g in grads)


def test_chunks_without_weight_are_not_computed(inputs):
    weights = np.zeros((B, S), np.float32)
    weights[:, 1::2] = inputs["weights"][:, 1::2] + 1  # as many tokens as one chunk has
    known = inputs | {"weights": weights}
    hidden = inputs["hidden"].copy()
    hidden[:, ::2] = np.nan
    close(ours(**known | {"hidden": hidden}), plain(**known), 1e-5)


def test_only_asked_for_gradients_exist(inputs):
    targets, weights = jnp.asarray(inputs["targets"]), jnp.asarray(inputs["weights"])

    def loss(hidden, head):
        return cross_entropy_sums(hidden, head, targets, weights)[0]

    arguments = inputs["hidden"], inputs["head"]
    program = str(jax.make_jaxpr(jax.grad(loss))(*arguments))
    both = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(*arguments))
    # The head's gradient would be accumulated from zeros of its shape.
    pattern = rf":f32\[{D},{V}\] = broadcast_in_dim"
    assert re.search(pattern, both) and not re.search(pattern, program)
    close(jax.jit(jax.grad(loss))(*arguments), plain(**inputs)[1][0] / 3, 1e-5)


def test_logits_never_exist_for_all_tokens(inputs):
    text = ours.lower(**inputs).compile().as_text()
    sizes = {
        int(np.prod([int(n) for n in dims.split(",")]))
        for dims in re.findall(r"\w\[([\d,]+)\]", text)
        if str(V) in dims.split(",")
    }
    assert B * CHUNK * V in sizes  # the check sees logits
    assert max(sizes) == B * CHUNK * V


@pytest.mark.parametrize(
    ("replica", "data", "expert"), [(1, 2, 4), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
)
@pytest.mark.parametrize("words", [200, V])
def test_a_mesh_shares_the_vocabulary_out(inputs, replica, data, expert, words):
    mesh = make_mesh(data, expert, replica=replica)
    inputs = {key: np.tile(x, (4, *[1] * (x.ndim - 1))) for key, x in inputs.items()}
    inputs["weights"] = inputs["weights"] * np.arange(4 * B, dtype=np.float32)[:, None]
    inputs["head"] = inputs["head"][:D, :words]
    inputs["targets"] = inputs["targets"] % words
    batch = NamedSharding(mesh, PartitionSpec(RULES.batch))
    columns = NamedSharding(mesh, RULES.spec((None, "vocab"), (D, words), mesh))
    places = {key: columns if key == "head" else batch for key in inputs}

    @partial(jax.jit, out_shardings=(None, (batch, columns)))
    def on_mesh(hidden, head, targets, weights):
        return jax.value_and_grad(
            lambda h, w: 3 * cross_entropy_sums(h, w, targets, weights, mesh)[0], argnums=(0, 1)
        )(hidden, head)

    @jax.jit
    def by_row(hidden, head, targets, weights):
        return cross_entropy_sums(hidden, head, targets, weights, mesh)[1]

    rows = [
        plain(**{k: v if k == "head" else v[i : i + 1] for k, v in inputs.items()})[0] / 3
        for i in range(len(inputs["hidden"]))
    ]
    close(by_row(**jax.tree.map(jax.device_put, inputs, places)), np.array(rows), 1e-5)

    compiled = on_mesh.lower(**jax.tree.map(jax.device_put, inputs, places)).compile()
    close(compiled(**jax.tree.map(jax.device_put, inputs, places)), plain(**inputs), 1e-5)
    # Logits of a chunk: the group's rows by the device's own words.
    rows = 8 // mesh.size
    own = f"f32[{rows * expert * CHUNK},{words // expert}]" if words % 8 == 0 else None
    program = compiled.as_text()
    assert (own or f"f32[{rows * CHUNK},{words}]") in program
    if own and expert > 1:
        assert f"[{D},{words}]" not in program  # nobody ever holds the whole head
