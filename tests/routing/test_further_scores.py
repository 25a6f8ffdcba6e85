"""Scores that cost more than the routing: against transformers, differences, meshes, packing."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esft_jax.checkpoint.load import load_model
from esft_jax.errors import InputError
from esft_jax.families import read_model_config
from esft_jax.model import Transformer
from esft_jax.ops.cross_entropy import cross_entropy_sums
from esft_jax.routing.score import contrast, gate_effects, score_experts
from esft_jax.routing.scores import load_scores
from esft_jax.sharding import make_mesh, param_shardings
from tests.routing.test_score import RAW, make_rows, part

MEASURED = "contribution", "gate_taylor"


def make_model(**options) -> Transformer:
    """Two MoE layers, of which the first one's inputs do not depend on routing."""
    return Transformer(read_model_config(RAW), rngs=nnx.Rngs(0), **options)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return make_model()


def learned_rows(count: int) -> dict[str, np.ndarray]:
    """`make_rows` with targets; about half of the tokens are learned."""
    rows = make_rows(count)
    rng = np.random.default_rng(1)
    targets = rng.integers(0, 64, rows["tokens"].shape).astype(np.int32)
    learned = (rng.random(targets.shape) < 0.5) & (rows["segment_ids"] > 0)
    return rows | {"targets": targets, "loss_weights": learned.astype(np.float32)}


def of_transformers(model, batch) -> dict[str, np.ndarray]:
    """Sums over what hooks see: each expert is applied alone, and gates get factors of 1."""
    from tests.yardstick import torch

    layers, seen, probes = [], [], []

    def before(module, inputs):
        hidden, ids, gates = inputs
        probes.append(torch.ones_like(gates, requires_grad=True))
        seen.append((module, hidden.detach(), ids, gates.detach()))
        return hidden, ids, gates * probes[-1]

    handles = []
    for number, block in enumerate(model.get_decoder().layers):
        for name, module in block.named_modules():
            if name.split(".")[-1] == "experts":
                handles.append(module.register_forward_pre_hook(before))
                layers.append(number)
    tokens, targets = (torch.tensor(batch[key]).long() for key in ("tokens", "targets"))
    logits = model(tokens).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    loss = (losses * torch.tensor(batch["loss_weights"]).flatten()).sum()
    gradients = torch.autograd.grad(loss, probes)
    for handle in handles:
        handle.remove()
    found = {key: np.zeros((len(layers), 8)) for key in MEASURED}
    for layer, ((module, hidden, ids, gates), gradient) in enumerate(
        zip(seen, gradients, strict=True)
    ):
        for k in range(ids.shape[1]):
            with torch.no_grad():
                alone = module(hidden, ids[:, k : k + 1], torch.ones_like(gates[:, k : k + 1]))
            norms = alone.norm(dim=-1) * gates[:, k]
            for expert in range(8):
                here = ids[:, k] == expert
                found["contribution"][layer, expert] += norms[here].sum()
                found["gate_taylor"][layer, expert] += gradient[:, k][here].abs().sum()
    return {key: value / value.sum(axis=1, keepdims=True) for key, value in found.items()}


@pytest.mark.parametrize(
    "case",
    [
        "gpt_oss",  # experts with biases
        "gemma4_text",  # scales of experts, beside a dense branch, normed
        pytest.param("deepseek_v3", marks=pytest.mark.slow),  # sigmoid, groups, biased choice
        pytest.param("deepseek_v2", marks=pytest.mark.slow),
        pytest.param("granitemoe", marks=pytest.mark.slow),
        pytest.param("qwen3_next", marks=pytest.mark.slow),
    ],
)
def test_scores_are_those_of_transformers(case, tmp_path) -> None:
    pytest.importorskip("torch")
    from tests.families.test_parity import make_pair

    theirs, folder = make_pair(case, tmp_path / "model")
    rng = np.random.default_rng(2)
    tokens, targets = rng.integers(3, 97, (2, 2, 24)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape),
        "loss_weights": (rng.random(tokens.shape) < 0.6).astype(np.float32),
    }
    expected = of_transformers(theirs, batch)
    scores = score_experts(load_model(folder), [batch], further=MEASURED)
    for method in MEASURED:
        np.testing.assert_allclose(scores.of(method), expected[method], rtol=2e-3, atol=1e-5)


def test_effects_of_gates_are_differences_of_the_loss(model) -> None:
    batch = {key: jnp.asarray(value) for key, value in learned_rows(2).items()}
    graph, params = nnx.split(model)

    def loss(params, probe):
        model = nnx.merge(graph, params)
        inputs = batch["tokens"], batch["segment_ids"], batch["positions"]
        hidden, _ = model.hidden_states(*inputs, gate_probe=probe)
        return cross_entropy_sums(
            hidden, model.head_weight(), batch["targets"], batch["loss_weights"]
        )[0]

    effects, _ = jax.jit(lambda p: gate_effects(nnx.merge(graph, p), batch))(params)
    assert effects.shape == (2, 2, 16, 2)
    assert not effects[:, batch["segment_ids"] == 0].any()
    loss = jax.jit(loss)
    rng = np.random.default_rng(3)
    for _ in range(4):
        # Few gates at once: none may change which experts the next layer chooses.
        direction = jnp.asarray(rng.normal(size=effects.shape) * (rng.random(effects.shape) < 0.1))
        up, down = (loss(params, step * direction.astype(jnp.float32)) for step in (1e-2, -1e-2))
        expected = (effects * direction).sum()
        np.testing.assert_allclose((up - down) / 2e-2, expected, rtol=2e-2, atol=1e-3)


def test_no_gradient_of_a_weight_is_computed(model) -> None:
    """Neither of experts nor of what lies above and below them."""
    batch = learned_rows(2)
    graph, params = nnx.split(model)

    def program(function):
        return jax.jit(function).lower(params, batch).compile().as_text()

    def with_weights(params, batch):
        def total(params):
            hidden, _ = nnx.merge(graph, params).hidden_states(batch["tokens"])
            return hidden.sum()

        return jax.grad(total)(params)

    # Before, since what JAX keeps of one program must not enter the other.
    assert "expert_weight_gradient" in program(with_weights)
    found = program(lambda p, b: gate_effects(nnx.merge(graph, p), b)[0])
    assert "expert_weight_gradient" not in found
    # Of embedding and head neither, which are alone in their shapes: only the weights themselves.
    made = [line for line in found.splitlines() if re.search(r"= f32\[(64,16|16,64)\]", line)]
    assert not [line for line in made if "dot" in line or "scatter" in line]


@pytest.mark.parametrize(
    "transport", ["all_gather", pytest.param("ragged_all_to_all", marks=pytest.mark.slow)]
)
def test_scores_on_a_mesh_equal_those_of_one_device(model, transport) -> None:
    mesh = make_mesh(2, 4)
    sharded = make_model(mesh=mesh, transport=transport)
    params = nnx.state(sharded)
    nnx.update(sharded, jax.device_put(params, param_shardings(params, mesh)))
    rows = learned_rows(8)
    one = score_experts(model, [rows], further=MEASURED)
    other = score_experts(sharded, [rows], further=MEASURED)
    for method in ("token", *MEASURED):
        np.testing.assert_allclose(one.of(method), other.of(method), rtol=1e-3)


def test_padding_and_packing_change_nothing(model) -> None:
    """A packed row counts like its documents in rows of their own, weighed by their tokens."""
    rows = learned_rows(2)  # of 8 and 9 tokens, and padding
    packed = {key: np.zeros((1, 24), value.dtype) for key, value in rows.items()}
    for row, (begin, length) in enumerate(((0, 8), (8, 9))):
        for key, value in rows.items():
            packed[key][0, begin : begin + length] = value[row, :length]
        packed["segment_ids"][0, begin : begin + length] = row + 1
    apart = [
        {key: jnp.asarray(value) for key, value in batch.items()}
        for batch in (packed, part(rows, 0, 1), part(rows, 1, 2))
    ]
    whole, *alone = (gate_effects(model, batch, output_norms=True) for batch in apart)
    for (effects, router), (begin, length) in zip(alone, ((0, 8), (8, 9)), strict=True):
        for found, expected in (
            (whole[0], effects),
            (whole[1].output_norms, router.output_norms),
        ):
            np.testing.assert_allclose(
                found[:, 0, begin : begin + length], expected[:, 0, :length], atol=1e-5
            )


def test_what_is_asked_for_changes_nothing_else(model, tmp_path) -> None:
    rows, general = learned_rows(4), make_rows(6)
    plain = score_experts(model, [rows])
    assert plain.methods == ("token", "gate", "gate_share")
    every = score_experts(
        model,
        [rows],
        further=("random", "contrast", *MEASURED),
        general=[part(general, 0, 4), part(general, 4, 6) | {}],
        seed=5,
    )
    np.testing.assert_array_equal(every.token, plain.token)
    np.testing.assert_allclose(every.gate, plain.gate, rtol=1e-6)
    counted = {"general_samples": 6, "general_tokens": int((general["segment_ids"] > 0).sum())}
    assert every.provenance == {**plain.provenance, **counted}
    share = score_experts(model, [general]).token
    quotient = plain.token / (share + 1 / 8)
    expected = quotient / quotient.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(every.contrast, expected, rtol=1e-5)
    draws = np.random.default_rng(5).exponential(size=(2, 8))
    np.testing.assert_allclose(every.random, draws / draws.sum(axis=1, keepdims=True))
    every.save(tmp_path)
    loaded = load_scores(tmp_path)
    assert loaded.methods == every.methods
    for method in every.methods:
        np.testing.assert_array_equal(loaded.of(method), every.of(method))
    with pytest.raises(InputError, match="method: contrast: was not measured; expected scores by"):
        plain.of("contrast")
    with pytest.raises(InputError, match="layer 1: contrasts sum to 2.0000, not to 1"):
        dataclasses.replace(every, contrast=2 * every.contrast)


def test_experts_that_neither_sample_uses_have_no_contrast() -> None:
    task = np.array([[0.5, 0.499, 0.001, 0.0]])
    general = np.array([[0.5, 0.25, 0.0, 0.25]])
    found = contrast(task, general)[0]
    assert np.argsort(-found).tolist() == [1, 0, 2, 3]
    assert found[3] == 0
    np.testing.assert_allclose(contrast(general, general + 0), contrast(general, general))


def test_rows_without_learned_tokens_have_no_gate_taylor(model) -> None:
    rows = learned_rows(2)
    rows["loss_weights"] = np.zeros_like(rows["loss_weights"])
    with pytest.raises(InputError, match="score: gate_taylor: 0 for all experts of a layer"):
        score_experts(model, [rows], further=("gate_taylor",))
