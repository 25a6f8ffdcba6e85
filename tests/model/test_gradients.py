"""Gradients against torch autograd on the same loss."""

import jax
import numpy as np
import pytest
from flax import nnx

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.training.step import token_loss
from tests.model.parity import stacked
from tests.yardstick import torch

# Uneven, with a layer in between that selects none.
EXPERTS = ExpertConfig({1: (0, 5), 3: (1, 2, 7)})


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(3)
    tokens, targets = rng.integers(1, 96, (2, 4, 12)).astype(np.int32)
    segments = np.ones((4, 12), np.int32)
    segments[1, 7:] = segments[3, 3:] = 0
    weights = rng.uniform(0, 1, (4, 12)).astype(np.float32) * segments
    weights[0, :4] = 0
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments,
        "positions": np.broadcast_to(np.arange(12, dtype=np.int32), (4, 12)),
        "loss_weights": weights,
    }


@pytest.fixture(scope="module")
def theirs(v2, batch):
    """Loss and gradients of torch, as our leaves."""
    v2.torch.zero_grad()
    logits = v2.torch(
        torch.tensor(batch["tokens"]), attention_mask=torch.tensor(batch["segment_ids"])
    ).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), torch.tensor(batch["targets"]).flatten().long(), reduction="none"
    )
    loss = (losses * torch.tensor(batch["loss_weights"]).flatten()).sum()
    loss.backward()
    grads = {name: weight.grad for name, weight in v2.torch.named_parameters()}
    v2.torch.zero_grad()
    return loss.item(), stacked(grads, v2.config)


def loss_and_gradients(model, experts, batch):
    graph, tuned, frozen = partition(model, experts)

    @jax.jit
    def call(tuned, frozen, batch):
        return jax.value_and_grad(
            lambda tuned: token_loss(nnx.merge(graph, tuned, frozen), batch)[0]
        )(tuned)

    loss, grads = call(tuned, frozen, batch)
    flat = nnx.to_flat_state(grads)
    return loss, {path: np.asarray(value.get_value()) for path, value in flat}


def assert_close(found, expected, name):
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert difference < 1e-4, (name, difference)


def test_gradients_of_all_parameters(v2, theirs, batch):
    loss, grads = loss_and_gradients(v2.jax, None, batch)
    assert loss == pytest.approx(theirs[0], rel=1e-5)
    assert grads.keys() == theirs[1].keys()
    for path, expected in theirs[1].items():
        assert_close(grads[path], expected, path)


def test_gradients_of_selected_experts(v2, theirs, batch):
    model = nnx.clone(v2.jax)
    attach_tuned_experts(model, EXPERTS)
    loss, grads = loss_and_gradients(model, EXPERTS, batch)
    assert loss == pytest.approx(theirs[0], rel=1e-5)
    assert set(grads) == {("tuned_experts", "gate_up"), ("tuned_experts", "down")}
    rows = model.tuned_experts.layout.rows()
    assert [(layer, expert) for layer, expert, _ in rows] == [
        (0, 0),
        (0, 5),
        (2, 1),
        (2, 2),
        (2, 7),
    ]
    for layer, expert, row in rows:
        for leaf in ("gate_up", "down"):
            expected = theirs[1]["moe_blocks", "moe", "experts", leaf][layer, expert]
            assert np.abs(expected).max() > 0
            assert_close(grads["tuned_experts", leaf][row], expected, (layer, expert, leaf))
