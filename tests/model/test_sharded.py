"""The training step on eight devices against one, and what its compiled form moves."""

import dataclasses
import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import TUNED, partition
from esft_jax.families import read_model_config
from esft_jax.model import Transformer
from esft_jax.planning.collectives import BETWEEN, received_bytes
from esft_jax.sharding import make_mesh, param_shardings, place_batch
from esft_jax.training.state import init_state, state_shardings
from esft_jax.training.step import make_train_step
from tests.checkpoint.checkpoints import SHAPE

LAYERS, NUM_EXPERTS, D, F = 3, 8, 32, 14
# No other array has sides of 32 and 28 or of 32 and 14, so expert weights are known by their shape.
CONFIG = dataclasses.replace(
    read_model_config(
        SHAPE
        | {
            "model_type": "deepseek_v2",
            "num_hidden_layers": LAYERS,
            "first_k_dense_replace": 0,
            "hidden_size": D,
            "moe_intermediate_size": F,
            "n_shared_experts": 3,
            "qk_rope_head_dim": 4,
        }
    ),
    expert_bias=True,
)
MATRICES, BIASES = ((D, 2 * F), (F, D)), ((2 * F,), (D,))
LEAVES = ("gate_up", "down", "gate_up_bias", "down_bias")
# Uneven by layer and by device; some devices have none in a layer, some none at all.
EXPERTS = ExpertConfig({0: (0, 1, 5), 1: (), 2: (2,)})


@pytest.fixture(scope="module")
def params():
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    experts, rng = model.moe_blocks.moe.experts, np.random.default_rng(5)
    for bias in (experts.gate_up_bias, experts.down_bias):
        bias.set_value(rng.normal(0, 0.1, bias.get_value().shape).astype(np.float32))
    return jax.tree.map(np.asarray, nnx.state(model))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(4)
    tokens, targets = rng.integers(1, 96, (2, 8, 12)).astype(np.int32)
    segments = np.ones((8, 12), np.int32)
    segments[1, 5:], segments[2, 4:], segments[6] = 2, 0, 0  # a row of padding alone
    positions = np.broadcast_to(np.arange(12), (8, 12)) - np.where(segments == 2, 5, 0)
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments,
        "positions": positions.astype(np.int32),
        "loss_weights": (segments > 0).astype(np.float32),
    }


def train_step(params, batch, mesh, transport="all_gather"):
    """Loss, gradients by (layer, expert), the compiled program's text, and the tuned layout."""
    model = nnx.eval_shape(
        lambda: Transformer(CONFIG, rngs=nnx.Rngs(0), mesh=mesh, transport=transport)
    )
    graph = nnx.graphdef(model)
    places = param_shardings(params, mesh)
    model = nnx.merge(graph, jax.tree.map(jax.device_put, params, places))
    attach_tuned_experts(model, EXPERTS)
    graph, tuned, frozen = partition(model, EXPERTS)
    optimizer = optax.trace(decay=0.0)  # keeps the gradients it is given
    state = init_state(optimizer, tuned, frozen)
    if mesh is not None:
        state = jax.device_put(state, state_shardings(state, mesh))
    args = (state, frozen, place_batch(batch, mesh))
    compiled = jax.jit(make_train_step(graph, optimizer)).lower(*args).compile()
    state, metrics = compiled(*args)
    bank = state.opt_state.inner_states[TUNED].inner_state.trace[TUNED].tuned_experts
    layout = model.tuned_experts.layout
    gradients = {
        (layer, expert, leaf): np.asarray(getattr(bank, leaf)[...])[row]
        for layer, expert, row in layout.rows()
        for leaf in LEAVES
    }
    return metrics["loss"], gradients, compiled.as_text(), layout


@pytest.fixture(scope="module")
def alone(params, batch):
    return train_step(params, batch, None)


def collectives(text):
    """Name and result shapes of each exchange between devices."""
    for line in text.splitlines():
        found = re.search(
            r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
            r"(?:-start)?\(",
            line,
        )
        if found:
            shapes = re.findall(r"\w+\[([\d,]*)\]", found[1])
            yield found[2], [[int(n) for n in s.split(",")] for s in shapes if s]


def bank_rows(shapes):
    return [shape for shape in shapes if tuple(shape[-2:]) in MATRICES]


@pytest.mark.parametrize(
    ("replica", "data", "expert"),
    [(1, 8, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8), (2, 2, 2), (4, 1, 2)],
)
def test_a_mesh_changes_nothing_and_moves_no_expert(params, batch, alone, replica, data, expert):
    mesh = make_mesh(data, expert, replica=replica)
    loss, gradients, text, layout = train_step(params, batch, mesh)
    np.testing.assert_allclose(loss, alone[0], atol=1e-5, rtol=0)
    assert gradients.keys() == alone[1].keys()
    for key, expected in alone[1].items():
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(gradients[key] / scale, expected / scale, atol=1e-5, rtol=0)

    # Every device holds its own experts, and only rows of its own in the bank.
    held = {
        tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]\S* parameter", text)
    }
    for matrix in MATRICES:
        assert (LAYERS, NUM_EXPERTS // expert, *matrix) in held
        assert (layout.rows_per_shard, *matrix) in held
    if expert > 1:
        for matrix in MATRICES:
            assert f"[{','.join(map(str, (LAYERS, NUM_EXPERTS, *matrix)))}]" not in text

    # Of expert weights only the bank's gradients travel: summed over the batch, never gathered, and
    # once for all layers, outside of every loop.
    entry = text[text.index("\nENTRY ") :]
    sums = [len([0 for _, shapes in collectives(t) if bank_rows(shapes)]) for t in (text, entry)]
    assert sums[0] == sums[1] and (sums[0] > 0) == (replica * data > 1)
    seen = list(collectives(text))
    assert any(name == "all-gather" for name, _ in seen)  # the check sees other weights' gathers
    for name, shapes in seen:
        for *leading, rows, columns in (shape for shape in shapes if len(shape) > 1):
            if (rows, columns) in MATRICES or (columns, rows) in MATRICES:
                assert name == "all-reduce" and leading == [layout.rows_per_shard], (name, shapes)

    # Between replicas only gradients of the bank are summed, and numbers, with those of assignments
    # for each expert: no weight is gathered.
    received = received_bytes(text, 8, slices=replica)
    between = {kind: size for kind, size in received.items() if kind.endswith(BETWEEN)}
    bank = sum(4 * layout.rows_per_shard * np.prod(shape) for shape in MATRICES + BIASES)
    if replica == 1:
        assert between == {}
    else:
        groups = replica * data  # the ring of an expert's copies
        assert between.keys() == {f"all-reduce{BETWEEN}"}
        summed, counts = between[f"all-reduce{BETWEEN}"], 4 * LAYERS * NUM_EXPERTS
        share = 2 * (groups - 1) / groups
        assert bank * share <= summed < 1.01 * (bank + counts) * share


def equal_steps(one, other):
    np.testing.assert_allclose(one[0], other[0], atol=1e-5, rtol=0)
    assert one[1].keys() == other[1].keys()
    for key, expected in other[1].items():
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(one[1][key] / scale, expected / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("replica", "data", "expert"), [(1, 4, 2), (1, 1, 8), (2, 1, 4)])
def test_tokens_sent_to_their_experts_give_the_same(params, batch, alone, replica, data, expert):
    mesh = make_mesh(data, expert, replica=replica)
    step = train_step(params, batch, mesh, "ragged_all_to_all")
    equal_steps(step, alone)
    # Tokens are sent, not gathered; expert weights stay where they are.
    assert "all-to-all" in {name for name, _ in collectives(step[2])}
    for name, shapes in collectives(step[2]):
        for *leading, rows, columns in (shape for shape in shapes if len(shape) > 1):
            if (rows, columns) in MATRICES or (columns, rows) in MATRICES:
                assert name == "all-reduce" and leading == [step[3].rows_per_shard], (name, shapes)
