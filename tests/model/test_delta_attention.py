"""Attention by the gated delta rule, against modules of transformers in both layouts."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from esft_jax.model.attention.delta import DeltaAttention
from esft_jax.model.config import DeltaAttentionConfig, NormConfig
from esft_jax.model.params import ParamFactory, Role
from esft_jax.sharding import RULES, make_mesh
from tests.model.parity import normal, run
from tests.yardstick import torch

SIZE, KEY_HEADS, HEADS, KEY, VALUE, TAPS, LENGTH = 40, 2, 6, 10, 14, 4, 80
SHAPE = {
    "hidden_size": SIZE,
    "linear_num_key_heads": KEY_HEADS,
    "linear_num_value_heads": HEADS,
    "linear_key_head_dim": KEY,
    "linear_value_head_dim": VALUE,
    "linear_conv_kernel_dim": TAPS,
    "num_hidden_layers": 4,
}
CASES = {"qwen3_next": "Qwen3NextGatedDeltaNet", "qwen3_5_moe": "Qwen3_5MoeGatedDeltaNet"}
LEAVES = {
    "in_proj_qkvz.weight": "mixed_gate",
    "in_proj_ba.weight": "beta_step",
    "in_proj_qkv.weight": "mixed",
    "in_proj_z.weight": "gate",
    "in_proj_b.weight": "beta",
    "in_proj_a.weight": "step",
    "conv1d.weight": "convolution",
    "A_log": "log_rate",
    "dt_bias": "step_offset",
    "out_proj.weight": "out",
}


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """A module of transformers with random weights, and ours with the same."""
    torch.manual_seed(0)
    name, by_key_head = request.param, request.param == "qwen3_next"
    config = transformers.AutoConfig.for_model(name if by_key_head else f"{name}_text", **SHAPE)
    modules = import_module(f"transformers.models.{name}.modeling_{name}")  # it needs torch
    theirs = getattr(modules, CASES[name])(config, 0).eval()
    ours = DeltaAttention(
        SIZE,
        DeltaAttentionConfig(KEY_HEADS, HEADS, KEY, VALUE, TAPS, by_key_head),
        ParamFactory(nnx.Rngs(0), jnp.bfloat16, 0.02),
        NormConfig(config.rms_norm_eps, offset=True),
    )
    leaves = nnx.to_flat_state(nnx.state(ours, nnx.Param))
    wide = {path for path, leaf in leaves if leaf.get_value().dtype == jnp.float32}
    assert wide == {("log_rate",), ("norm", "scale")}
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(0.5 if weight.ndim == 1 else 0, 0.3)
            leaf = ours.norm.scale if name == "norm.weight" else getattr(ours, LEAVES[name])
            leaf.set_value(jnp.asarray(weight.squeeze().numpy().T))
    assert len(leaves) == len([*theirs.parameters()])
    return theirs, ours


def expected(theirs, x):
    with torch.no_grad():
        return theirs(torch.tensor(x)).numpy()


def unused(rows, length):
    """Cosines, or sines: positions do not matter."""
    return jnp.zeros((rows, length, 3))


def test_packed_rows_are_documents_of_transformers(pair):
    theirs, ours = pair
    x, segments = normal(2, LENGTH, SIZE), np.ones((2, LENGTH), np.int32)
    segments[1] = np.repeat([1, 2, 3, 0], [66, 2, 7, 5])
    found = run(ours, x, unused(2, LENGTH), unused(2, LENGTH), segments)
    np.testing.assert_allclose(found[0], expected(theirs, x[:1])[0], atol=5e-5)
    for document in (1, 2, 3):
        own = segments[1] == document
        wanted = expected(theirs, x[1:, own])[0]
        np.testing.assert_allclose(found[1, own], wanted, atol=5e-5)


def test_decoding_is_that_of_transformers_whatever_the_padding(pair):
    theirs, ours = pair
    x = normal(2, LENGTH, SIZE)
    cache = DeltaAttention.empty_cache(ours.config, (2, LENGTH), jnp.float32)
    # Tokens of each row, block by block: a prompt, single tokens, none at all, many.
    counts, begins, parts = [(5, 3), (1, 1), (0, 1), (70, 66)], np.zeros(2, int), ([], [])
    for count in counts:
        keep = np.arange(max(count)) < np.array(count)[:, None]
        block = np.full((2, max(count), SIZE), 7.0, np.float32)
        for row, size in enumerate(count):
            block[row, :size] = x[row, begins[row] : begins[row] + size]
        angle, positions = unused(2, max(count)), jnp.zeros(keep.shape, jnp.int32)
        given = jnp.asarray(block), angle, angle, positions, jnp.asarray(keep)
        out, cache = ours.decode(*given, cache)
        for row, size in enumerate(count):
            parts[row].append(out[row, :size])
        begins += count
    for row, found in enumerate(parts):
        wanted = expected(theirs, x[row : row + 1, : begins[row]])[0]
        np.testing.assert_allclose(np.concatenate(found), wanted, atol=5e-5)


def test_gradients_are_those_of_transformers(pair):
    theirs, ours = pair
    x, cotangent = normal(1, LENGTH, SIZE), normal(1, LENGTH, SIZE, seed=1)
    theirs.zero_grad()
    (theirs(torch.tensor(x)) * torch.tensor(cotangent)).sum().backward()
    graph, params = nnx.split(ours)
    ones = jnp.ones((1, LENGTH), jnp.int32)

    @jax.jit
    def gradients(params):
        def loss(params):
            angle = unused(1, LENGTH)
            out = nnx.merge(graph, params)(jnp.asarray(x), angle, angle, ones)
            return (out * cotangent).sum()

        return jax.grad(loss)(params)

    found = gradients(params)
    for name, weight in theirs.named_parameters():
        leaf = found["norm"]["scale"] if name == "norm.weight" else found[LEAVES[name]]
        wanted = weight.grad.squeeze().numpy().T
        difference = np.abs(leaf.get_value() - wanted).max() / np.abs(wanted).max()
        assert difference < 1e-4, name


def test_roles_and_matrices(pair):
    _, ours = pair
    params = {n: p for n, p in nnx.state(ours, nnx.Param).items() if n != "norm"}
    assert {p.role for p in params.values()} == {Role.ATTENTION}
    matrices = {n for n, p in params.items() if p.get_value().ndim == 2}
    assert matrices - {"convolution"} == set(ours.matrices)


def test_devices_compute_rows_of_their_own(pair):
    _, ours = pair
    x, segments = normal(8, LENGTH, SIZE), np.ones((8, LENGTH), np.int32)
    segments[3, 40:] = 2
    mesh = make_mesh(data=2, expert=4)
    graph, params = nnx.split(ours)
    places = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(RULES.batch))

    @partial(jax.jit, in_shardings=places, out_shardings=places[1])
    def call(params, x):
        angle = unused(8, LENGTH)
        return nnx.merge(graph, params)(x, angle, angle, jnp.asarray(segments), mesh)

    compiled = call.lower(params, jnp.asarray(x)).compile()
    moved = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    assert not any(name in compiled.as_text() for name in moved)
    found = compiled(*jax.device_put((params, jnp.asarray(x)), places))
    wanted = run(ours, x, unused(8, LENGTH), unused(8, LENGTH), segments)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
