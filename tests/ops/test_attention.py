"""Attention over packed documents: every implementation against float64, and what XLA's holds."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.tpu import force_tpu_interpret_mode
from jax.extend.core import subjaxprs
from jax.interpreters.partial_eval import dce_jaxpr

from esft_jax.model.remat import REMAT
from esft_jax.ops.attention import causal_attention, masked_attention, xla

B, S, H, R, W = 2, 24, 2, 4, 3
SCALE = 0.7
IMPLEMENTATIONS = ("cpu", "xla", "tpu", "gpu")


def make_inputs(length, width, value_width, heads=H, key_heads=H):
    rng = np.random.default_rng(0)
    sizes = (heads, width), (key_heads, width), (key_heads, value_width)
    query, key, value = (rng.normal(size=(B, length, *s)).astype(np.float32) for s in sizes)
    # Documents that straddle blocks, padding that fills whole ones, and a number that comes back.
    segments = np.zeros((B, length), np.int32)
    segments[0], segments[0, : length // 2 - 1] = 2, 1
    segments[1, : length // 5], segments[1, length // 5 : length // 3] = 1, 2
    segments[1, -2:] = 1
    return query * (R / width) ** 0.5, key, value, segments


@pytest.fixture(scope="module")
def inputs():
    return make_inputs(S, R, W)


def make_sinks(heads):
    """Below, among and above the scores."""
    return np.linspace(-3, 3, heads, dtype=np.float32)


def expected(query, key, value, segments, window=None, sinks=None):
    """Result, and gradients of the sum of its squares, in float64."""
    query, key, value = (x.astype(np.float64) for x in (query, key, value))
    key_heads = key.shape[2]
    key, value = (np.repeat(x, query.shape[2] // key_heads, axis=2) for x in (key, value))
    length = query.shape[1]
    seen = np.tril(np.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None])
    if window is not None:
        seen &= ~np.tril(np.ones((length, length), bool), -window)
    weights = np.exp(SCALE * np.einsum("bqhr,bshr->bhqs", query, key)) * seen[:, None]
    total = weights.sum(axis=-1, keepdims=True)
    if sinks is not None:
        sinks = np.exp(sinks.astype(np.float64))[:, None, None]
        total += sinks
    weights /= total
    out = np.einsum("bhqs,bshw->bqhw", weights, value)
    dweights = np.einsum("bqhw,bshw->bhqs", 2 * out, value)
    mean = (dweights * weights).sum(axis=-1, keepdims=True)
    dscores = weights * (dweights - mean) * SCALE

    def added(parts):
        """Of the heads of queries that meet one of keys and values."""
        return parts.reshape(B, length, key_heads, -1, parts.shape[-1]).sum(axis=3)

    return out, (
        np.einsum("bhqs,bshr->bqhr", dscores, key),
        added(np.einsum("bhqs,bqhr->bshr", dscores, query)),
        added(np.einsum("bhqs,bqhw->bshw", weights, 2 * out)),
        *([] if sinks is None else [-(sinks / total * mean).sum(axis=(0, 2, 3))]),
    )


def run(inputs, implementation="xla", window=None, sinks=None):
    *arrays, segments = map(jnp.asarray, inputs)
    if sinks is not None:
        arrays.append(jnp.asarray(sinks))

    def loss(query, key, value, sinks=None):
        out = causal_attention(
            *(query, key, value, segments, SCALE),
            window=window,
            sinks=sinks,
            implementation=implementation,
        )
        return (out.astype(jnp.float32) ** 2).sum(), out

    with contextlib.ExitStack() as stack:
        if implementation == "tpu":
            # Any true value but `InterpretParams` chooses the interpreter that is fast to compile.
            stack.enter_context(force_tpu_interpret_mode(True))
        gradients, out = jax.jit(jax.grad(loss, range(len(arrays)), has_aux=True))(*arrays)
    return out, gradients


def close(found, wanted, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max())


# The second size has several blocks, a row that they do not divide, and heads like those of MLA.
@pytest.mark.parametrize(
    "size", [(S, R, W), (300, 24, 16), (S, R, W, 6, 2), (300, 16, 16, 4, 1)], ids=str
)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_sees_earlier_tokens_of_its_document(implementation, size):
    inputs = make_inputs(*size)
    close(run(inputs, implementation), expected(*inputs), 1e-5)


# Windows around the length of a row, and around that of a block, with documents that end inside.
WINDOWS = [(S, 1), *((S, S + more) for more in (-1, 0, 1)), *((300, w) for w in (33, 128, 129))]


@pytest.mark.parametrize(("length", "window"), WINDOWS, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_windows_and_sinks(implementation, length, window):
    inputs, sinks = make_inputs(length, 16, 12, 6, 2), make_sinks(6)
    close(run(inputs, implementation, window, sinks), expected(*inputs, window, sinks), 1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("one", ["window", "sinks"])
def test_a_window_or_sinks_alone(inputs, implementation, one):
    given = {"window": {"window": 5}, "sinks": {"sinks": make_sinks(H)}}[one]
    close(run(inputs, implementation, **given), expected(*inputs, **given), 1e-5)


def test_a_block_meets_no_keys_outside_the_windows_of_its_queries(monkeypatch):
    monkeypatch.setattr(xla, "SMALLEST_BLOCK", 8)
    monkeypatch.setattr(xla, "LARGEST_BLOCK", 16)
    program = str(jax.make_jaxpr(partial(run, window=6))(make_inputs(S, R, W)))
    for keys in (8, 8 + 5):
        assert f"f32[2,2,1,8,{keys}]" in program
    assert ",16,16]" not in program
    assert "f32[2,2,1,8,16]" not in program


def test_sinks_join_the_softmax_over_a_cache():
    query, key, value, segments = make_inputs(S, 16, 12, 6, 2)
    sinks, index = make_sinks(6), np.arange(S)
    visible = (segments[:, :, None] == segments[:, None]) & (index <= index[:, None])
    out = jax.jit(masked_attention, static_argnums=4)(query, key, value, visible, SCALE, sinks)
    close(out, expected(query, key, value, segments, None, sinks)[0], 1e-5)


@pytest.mark.parametrize("implementation", ["xla", "tpu", "gpu"])
def test_bfloat16_is_off_by_about_its_own_rounding(implementation):
    *arrays, segments = make_inputs(S, R, W)
    arrays, sinks = [x.astype(jnp.bfloat16) for x in arrays], make_sinks(H)
    out, gradients = run((*arrays, segments), implementation, None, sinks)
    wanted = jax.tree.leaves(expected(*arrays, segments, None, sinks))
    assert [x.dtype for x in gradients] == [*[jnp.bfloat16] * 3, jnp.float32]
    assert out.dtype == jnp.bfloat16
    for one, other in zip((out, *gradients), wanted, strict=True):
        assert np.sqrt(np.mean((one - other) ** 2) / np.mean(other**2)) < 1.2e-2


@pytest.mark.parametrize("implementation", ["cpu", "xla"])
def test_what_is_not_a_number_stays_so_and_in_its_place(inputs, implementation):
    query, key, value, segments = inputs
    key = key.copy()
    key[0, 5, 1] = np.nan
    operands = map(jnp.asarray, (query, key, value, segments))
    out = causal_attention(*operands, SCALE, implementation=implementation)
    sees = (segments[0] == segments[0, 5]) & (np.arange(S) >= 5)
    expected = np.zeros(out.shape, bool)
    expected[0, sees, 1] = True
    np.testing.assert_array_equal(np.isnan(out), expected)


def count_kernels(jaxpr, name):
    """How often a program calls a kernel, in all programs within it."""
    called = [e.params.get("target_name") or e.params.get("name") for e in jaxpr.eqns]
    return called.count(name) + sum(count_kernels(part, name) for part in subjaxprs(jaxpr))


FORWARD = {
    "cpu": "esft_jax_attention",
    "tpu": "splash_mha_fwd_segmented_residuals",
    "gpu": "attention_forward",
}


@pytest.mark.parametrize(("remat", "times"), [("attention", 1), ("full", 2)])
@pytest.mark.parametrize("implementation", FORWARD)
def test_the_policy_attention_runs_the_forward_kernel_once(implementation, remat, times):
    query, *_, segments = map(jnp.asarray, make_inputs(S, R, R))

    def loss(x):
        @REMAT[remat]
        def layer(x, _):
            x = jnp.sin(x)
            return causal_attention(x, x, x, segments, SCALE, implementation=implementation), None

        return jax.lax.scan(layer, x, length=2)[0].sum()

    program = jax.make_jaxpr(jax.grad(loss))(query).jaxpr
    needed, _ = dce_jaxpr(program, [True] * len(program.outvars))
    assert count_kernels(needed, FORWARD[implementation]) == times


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_implementation_is_named(inputs):
    with pytest.raises(ValueError, match="'cudnn' is not one of cpu, gpu, tpu, xla"):
        causal_attention(*inputs, SCALE, implementation="cudnn")


WRONG = {
    "fewer key heads": ({"key": (B, S, 1, R)}, "expected as many heads"),
    "more key and value heads": (
        {"key": (B, S, 3, R), "value": (B, S, 3, W)},
        r"key float32 \(2, 24, 3, 4\)",
    ),
    "fewer query heads": ({"query": (B, S, 1, R)}, "expected as many heads of keys"),
    "other widths": ({"key": (B, S, H, R + 1)}, "queries and keys of one width"),
    "no width": ({"query": (B, S, H, 0), "key": (B, S, H, 0)}, "queries and keys of one width"),
    "fewer keys": ({"key": (B, S - 1, H, R)}, "a value per key"),
    "fewer keys and values": (
        {"key": (B, S - 1, H, R), "value": (B, S - 1, H, W)},
        "24 queries and 23 keys in a row",
    ),
    "fewer rows": ({"value": (1, S, H, W)}, "as many rows"),
    "no heads axis": ({"query": (B, S, R)}, r"expected \[rows, tokens, heads, width\]"),
    "fewer sinks": ({"sinks": (H - 1,)}, r"sinks is float32 \(1,\); expected float32 \(2,\)"),
    "fewer segments": ({"segments": (B, S - 1)}, r"segment_ids is int32 \(2, 23\)"),
}


@pytest.mark.parametrize(("changed", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_fit_are_refused(inputs, implementation, changed, message):
    named = dict(zip(("query", "key", "value", "segments"), inputs, strict=True))
    types = {name: x.dtype for name, x in named.items()} | {"sinks": np.float32}
    named |= {name: np.ones(shape, types[name]) for name, shape in changed.items()}
    sinks = named.pop("sinks", None)
    with pytest.raises(ValueError, match=message):
        causal_attention(*named.values(), SCALE, sinks=sinks, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("unchecked")
def test_a_window_without_tokens_is_refused(inputs, implementation):
    with pytest.raises(ValueError, match="a window of 0 tokens"):
        causal_attention(*inputs, SCALE, window=0, implementation=implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("unchecked")
def test_other_types_are_refused(inputs, implementation):
    *arrays, segments = inputs
    attend = partial(causal_attention, scale=SCALE, implementation=implementation)
    for dtype in (np.int8, jnp.float8_e4m3fn):
        with pytest.raises(ValueError, match=f"query {np.dtype(dtype)} .*float32 or bfloat16"):
            attend(*(x.astype(dtype) for x in arrays), segments)
    query, key, value = arrays
    with pytest.raises(ValueError, match="key bfloat16 .*the same for all"):
        attend(query, key.astype(jnp.bfloat16), value, segments)
    with pytest.raises(ValueError, match="segment_ids is float32"):
        attend(*arrays, segments.astype(np.float32))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_in_is_nothing_out(inputs, implementation):
    out = causal_attention(
        *(jnp.asarray(x[:, :0]) for x in inputs), SCALE, implementation=implementation
    )
    assert out.shape == (B, 0, H, W)


@pytest.mark.usefixtures("unchecked")
def test_a_mask_that_does_not_fit_is_refused(inputs):
    query, key, value, _ = inputs
    with pytest.raises(ValueError, match=r"visible is bool \(2, 1, 24\)"):
        masked_attention(query, key, value, np.ones((B, 1, S), bool), SCALE)


def test_blocks_of_queries_change_nothing(inputs, monkeypatch):
    whole = run(inputs)
    monkeypatch.setattr(xla, "SMALLEST_BLOCK", 8)
    close(run(inputs), whole, 2e-6)


def test_the_gradient_holds_scores_of_one_block_at_a_time(inputs, monkeypatch):
    monkeypatch.setattr(xla, "SMALLEST_BLOCK", 8)
    monkeypatch.setattr(xla, "BLOCKS", 3)
    program = str(jax.make_jaxpr(run)(inputs))
    for keys in (8, 16, 24):  # no block meets keys after its last query
        assert f"f32[2,2,1,8,{keys}]" in program
    assert "24,24]" not in program


def test_a_query_that_sees_nothing_is_finite(inputs):
    query, key, value, _ = inputs
    out = jax.jit(masked_attention, static_argnums=4)(
        query, key, value, np.zeros((B, S, S), bool), SCALE
    )
    assert np.isfinite(out).all()
