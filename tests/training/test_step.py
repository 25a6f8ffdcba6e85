import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import esft_jax.training.step as step_module
from esft_jax.adapt.attach import attach, attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.adapt.partition import partition
from esft_jax.checkpoint.load import load_model
from esft_jax.families import load_model_config
from esft_jax.model import Transformer
from esft_jax.model.router import RouterOutput
from esft_jax.optimizer_config import OptimizerConfig
from esft_jax.training.optimizer import make_optimizer
from esft_jax.training.state import init_state
from esft_jax.training.step import (
    balance_loss,
    count_assignments,
    expert_load,
    make_train_step,
    token_loss,
)

EXPERTS = ExpertConfig({1: (3, 0), 2: (5,), 3: (1, 6, 7)})


@pytest.fixture(scope="module")
def batch() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 4096, (4, 32)).astype(np.int32)
    segment_ids = np.repeat([[1], [1], [2], [1]], 32, axis=1).astype(np.int32)
    segment_ids[1, 20:] = 0
    positions = np.broadcast_to(np.arange(32, dtype=np.int32), (4, 32))
    # Uneven numbers of targets, so that a mean of means would differ from the mean.
    weights = (rng.random((4, 32)) < np.array([[0.9], [0.1], [0.5], [0.3]])) * (segment_ids > 0)
    return {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": segment_ids,
        "positions": positions,
        "loss_weights": weights.astype(np.float32),
    }


@pytest.fixture(scope="module")
def esft_step(base, batch):
    """Structure, frozen parameters, state before, and state and metrics after one step."""
    model = load_model(base)
    attach_tuned_experts(model, EXPERTS)
    graph, tuned, frozen = partition(model, EXPERTS)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), steps=10)
    before = init_state(optimizer, tuned, frozen)
    after, metrics = jax.jit(make_train_step(graph, optimizer))(before, frozen, batch)
    return graph, frozen, optimizer, before, after, metrics


def test_only_selected_experts_change(esft_step) -> None:
    _, _, _, before, after, _ = esft_step
    assert set(before.tuned) == {"tuned_experts"}
    change = jax.tree.map(lambda a, b: jnp.abs(a - b).max(axis=(1, 2)), before.tuned, after.tuned)
    for leaf in jax.tree.leaves(change):
        assert leaf.shape == (6,)
        assert (leaf > 0).all()


def test_optimizer_state_exists_for_tuned_leaves_only(esft_step) -> None:
    _, _, _, before, _, _ = esft_step
    tuned = sum(leaf.size for leaf in jax.tree.leaves(before.tuned))
    moments = sum(leaf.size for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim)
    assert moments == 2 * tuned
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(before.tuned))


def test_gradients_are_slices_of_the_full_ones(base, batch, esft_step) -> None:
    graph, frozen, _, before, _, _ = esft_step
    model = load_model(base)
    full_graph, params, _ = partition(model, None)

    def loss(model: Transformer, batch) -> jax.Array:
        return token_loss(model, batch)[0]

    full = jax.jit(jax.grad(lambda p, b: loss(nnx.merge(full_graph, p), b)))(params, batch)
    tuned = jax.jit(jax.grad(lambda t, b: loss(nnx.merge(graph, t, frozen), b)))(
        before.tuned, batch
    )
    bank = nnx.merge(graph, before.tuned, frozen).tuned_experts
    for name in ("gate_up", "down"):
        every = full["moe_blocks"]["moe"]["experts"][name][...]
        for layer, expert, row in bank.layout.rows():
            expected = every[layer, expert]
            found = tuned["tuned_experts"][name][...][row]
            assert jnp.abs(expected).max() > 0
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_micro_batches_give_the_loss_and_update_of_the_whole_batch(batch, esft_step) -> None:
    graph, frozen, optimizer, before, after, metrics = esft_step
    step = jax.jit(make_train_step(graph, optimizer, micro_batches=2, remat="full"))
    parts, split_metrics = step(before, frozen, batch)
    assert "experts/tuned_share" in metrics
    for name in ("loss", "grad_norm", "target_tokens", *(n for n in metrics if "experts/" in n)):
        np.testing.assert_allclose(split_metrics[name], metrics[name], rtol=1e-5)
    moments = zip(jax.tree.leaves(parts.opt_state), jax.tree.leaves(after.opt_state), strict=True)
    for one, other in moments:
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("masters", [jnp.float32, jnp.bfloat16])
def test_micro_batches_give_the_gradients_of_factors(base, batch, masters) -> None:
    model = load_model(base)
    lora = LoRA.on(model.config, 2, 8.0, ("selected_experts",), EXPERTS)  # a scale of 4
    attach(model, lora, seed=0)
    graph, tuned, frozen = partition(model, lora, masters)
    tuned = jax.tree.map(lambda x: (x + 0.01).astype(x.dtype), tuned)  # B is 0 at first
    optimizer = optax.trace(0.0)  # keeps the gradients it is given
    before, found = init_state(optimizer, tuned, frozen), {}
    for parts in 1, 4:
        step = jax.jit(make_train_step(graph, optimizer, micro_batches=parts))
        found[parts] = step(before, frozen, batch)[0].opt_state
    largest = 2.0**-7 if masters == jnp.bfloat16 else 1e-5
    for one, other in zip(*map(jax.tree.leaves, found.values()), strict=True):
        assert one.any()
        np.testing.assert_allclose(one, other, atol=largest * np.abs(one).max())


def test_losses_and_tokens_by_source_are_those_of_its_rows_alone(batch, esft_step) -> None:
    graph, frozen, optimizer, before, _, metrics = esft_step
    mixed = batch | {"sources": np.array([2, 0, 2, 0], np.int32)}
    names = ("task", "none", "other")
    for micro_batches in 1, 2:
        step = jax.jit(
            make_train_step(graph, optimizer, sources=names, micro_batches=micro_batches)
        )
        _, found = step(before, frozen, mixed)
        np.testing.assert_allclose(found["loss"], metrics["loss"], rtol=1e-6)
        model = nnx.merge(graph, before.tuned, frozen)
        for name, rows in {"task": [1, 3], "other": [0, 2]}.items():
            alone = {key: jnp.asarray(value[rows]) for key, value in batch.items()}
            tokens = alone["loss_weights"].sum()
            assert found[f"target_tokens/{name}"] == tokens
            expected = token_loss(model, alone)[0] / tokens
            np.testing.assert_allclose(found[f"loss/{name}"], expected, rtol=1e-5)
        assert found["target_tokens/none"] == 0 and np.isnan(found["loss/none"])


def test_the_load_of_experts_is_that_of_the_router_outputs(base, batch, esft_step) -> None:
    metrics = esft_step[-1]
    model = load_model(base)

    @jax.jit
    def chosen(batch):
        inputs = batch["tokens"], batch["segment_ids"], batch["positions"]
        return model.hidden_states(*inputs)[1].expert_ids

    ids = np.asarray(chosen(batch))  # as before the update, since copies begin equal
    layers, experts = model.config.moe_layers, model.config.router.num_experts
    counts = np.array([np.bincount(i.ravel(), minlength=experts + 1)[:experts] for i in ids])
    assert counts.sum() == len(layers) * (batch["segment_ids"] > 0).sum() * ids.shape[-1]
    shares = counts / counts.sum(axis=1, keepdims=True)
    logs = np.log(np.where(shares > 0, shares, 1))
    own = [(layers.index(layer), i) for layer, ids in EXPERTS.experts.items() for i in ids]
    tuned = sum(counts[place] for place in own)
    expected = {
        "max_over_mean": (shares.max(axis=1) * experts).mean(),
        "min_over_mean": (shares.min(axis=1) * experts).mean(),
        "entropy": -(shares * logs).sum(axis=1).mean() / np.log(experts),
        "tuned_share": tuned / counts.sum(),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"experts/{name}"], value, rtol=1e-5)
    assert 0 < expected["tuned_share"] < 1


def test_equal_and_idle_loads() -> None:
    equal = expert_load(jnp.full((2, 4), 3), None)
    assert {float(value) for value in equal.values()} == {1.0} and len(equal) == 3
    one = expert_load(jnp.array([[6, 0, 0]]), np.array([[False, True, True]]))
    assert [float(value) for value in one.values()] == [3.0, 0.0, 0.0, 0.0]


def test_the_load_of_experts_costs_a_step_nothing_noticeable(batch, esft_step, monkeypatch) -> None:
    """Counting takes what the step has made anyway: no pass, no product, no exchange of its own."""
    graph, frozen, optimizer, before, _, _ = esft_step

    def compiled():
        step = jax.jit(make_train_step(graph, optimizer))
        return step.lower(before, frozen, batch).compile()

    counting = compiled()
    uncounted = jnp.zeros((3, 8), jnp.int32)
    monkeypatch.setattr(step_module, "count_assignments", lambda router: uncounted)
    plain = compiled()
    for cost in ("flops", "bytes accessed"):
        assert counting.cost_analysis()[cost] < 1.01 * plain.cost_analysis()[cost]
    memory, least = (x.memory_analysis().temp_size_in_bytes for x in (counting, plain))
    assert memory < 1.01 * least
    for operation in (" dot(", " while(", " scatter(", "custom-call("):
        assert counting.as_text().count(operation) == plain.as_text().count(operation)


def test_balance_loss_is_one_per_layer_when_uniform_and_more_when_not() -> None:
    ids = jnp.arange(16).reshape(1, 1, 8, 2) % 4
    uniform = RouterOutput(ids, jnp.ones((1, 1, 8, 2)), jnp.full((1, 1, 8, 4), 0.25))
    np.testing.assert_allclose(balance_loss(uniform, count_assignments(uniform)), 1.0, rtol=1e-6)
    skewed = uniform._replace(
        expert_ids=ids % 2, scores=jnp.broadcast_to(jnp.array([0.5, 0.5, 0, 0]), (1, 1, 8, 4))
    )
    np.testing.assert_allclose(balance_loss(skewed, count_assignments(skewed)), 2.0, rtol=1e-6)


def many_experts(base):
    """A model whose experts hold most of its parameters, biases among them."""
    config = load_model_config(base)
    router = dataclasses.replace(config.router, num_experts=64)
    return dataclasses.replace(config, expert_width=64, expert_bias=True, router=router)


def test_compiled_step_needs_a_fraction_of_full_training(base, batch) -> None:
    """Arguments and temporaries of the compiled step, experts holding most of the weights."""
    bytes_used, config = {}, many_experts(base)
    for name, experts in (("full", None), ("esft", ExpertConfig({1: (3, 0), 2: (5,), 3: (1,)}))):
        model = Transformer(config, rngs=nnx.Rngs(0))
        if experts:
            attach_tuned_experts(model, experts)
        graph, tuned, frozen = partition(model, experts)
        optimizer = make_optimizer(OptimizerConfig(), steps=10)
        state = jax.eval_shape(lambda t, o=optimizer, f=frozen: init_state(o, t, f), tuned)
        step = jax.jit(make_train_step(graph, optimizer), donate_argnums=0)
        compiled = step.lower(state, frozen, batch).compile()
        memory = compiled.memory_analysis()
        bytes_used[name] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        weight_gradients = [
            line for line in compiled.as_text().splitlines() if "expert_weight_gradient" in line
        ]
        for sides in ("32,128", "1,128"):  # of a matrix, and of a bias
            for count, method in ((2, "esft"), (64, "full")):
                there = any(f"f32[{count},{sides}]" in line for line in weight_gradients)
                assert there == (name == method)
    assert bytes_used["esft"] < 0.5 * bytes_used["full"]


def test_gradients_of_micro_batches_add_up_in_place(base, batch) -> None:
    """No gradient of the tuned experts lies beside the sum of those before it."""
    experts = ExpertConfig(dict.fromkeys((1, 2, 3), tuple(range(60))), also=("router",))
    model = Transformer(many_experts(base), rngs=nnx.Rngs(0))
    attach_tuned_experts(model, experts)
    graph, tuned, frozen = partition(model, experts)
    state = init_state(optax.sgd(1.0), tuned, frozen)
    updated, temporaries = [], []
    # A loss that may go through the model twice is added up beside.
    for loss in (token_loss, lambda *given: token_loss(*given)):
        step = jax.jit(make_train_step(graph, optax.sgd(1.0), loss=loss, micro_batches=4))
        compiled = step.lower(state, frozen, batch).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
        updated.append(compiled(state, frozen, batch)[0].tuned)
    banks = sum(leaf.nbytes for leaf in jax.tree.leaves(tuned["tuned_experts"]))
    assert temporaries[0] + 0.9 * banks < temporaries[1]
    for before, *after in zip(*map(jax.tree.leaves, (tuned, *updated)), strict=True):
        np.testing.assert_allclose(*after, atol=1e-6)
        assert jnp.abs(after[0] - before).max() > 1e-4


@pytest.mark.parametrize(
    ("experts", "trained"),
    [
        (ExpertConfig({}, also=("shared_experts",)), {"shared_experts"}),
        pytest.param(
            ExpertConfig({1: (3,)}, also=("non_expert_modules",)),
            {"attention", "router", "mlp", "embedding", "norm", "tuned_experts"},
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ExpertConfig({1: (3,)}, also=("shared_experts",)),
            {"shared_experts", "tuned_experts"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shared-alone", "experts-and-rest", "experts-and-shared"],
)
def test_other_modules_train_when_asked_for(base, batch, experts, trained) -> None:
    model = load_model(base)
    attach_tuned_experts(model, experts)
    graph, tuned, frozen = partition(model, experts)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.0), steps=10)
    before = init_state(optimizer, tuned, frozen)
    after, _ = jax.jit(make_train_step(graph, optimizer))(before, frozen, batch)
    parts = [{*path} for path, _ in nnx.to_flat_state(before.tuned)]
    assert trained <= set().union(*parts)
    assert not any("experts" in part for part in parts)
    assert any("shared_experts" in part for part in parts) == ("shared_experts" in experts.also)
    assert any("attention" in part for part in parts) == ("non_expert_modules" in experts.also)
    change = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), before.tuned, after.tuned)
    assert all(leaf > 0 for leaf in jax.tree.leaves(change))


def test_a_lora_step_has_gradients_and_moments_of_factors_only(base, batch) -> None:
    config = many_experts(base)
    model = Transformer(config, rngs=nnx.Rngs(0))
    lora = LoRA.on(config, 3, 6.0, ("attention", "selected_experts"), EXPERTS)
    attach(model, lora, seed=0)
    graph, tuned, frozen = partition(model, lora)
    assert all("lora" in path or path[0] == "tuned_experts" for path, _ in nnx.to_flat_state(tuned))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, weight_decay=0.0), steps=10)
    before = init_state(optimizer, tuned, frozen)
    factors = sum(leaf.size for leaf in jax.tree.leaves(tuned))
    moments = sum(leaf.size for leaf in jax.tree.leaves(before.opt_state) if leaf.ndim)
    assert moments == 2 * factors < 0.05 * sum(leaf.size for leaf in jax.tree.leaves(frozen))
    step = jax.jit(make_train_step(graph, optimizer)).lower(before, frozen, batch).compile()
    found = {
        shape
        for line in step.as_text().splitlines()
        if "expert_weight_gradient" in line
        for shape in re.findall(r"f32\[([\d,]+)\]", line.partition("=")[2].partition("(")[0])
    }
    # The window of three, gate and up together: of A, of B, of each of down. None is as wide as a
    # weight on both sides, and none is of biases.
    assert {"3,32,6", "3,6,128", "3,64,3", "3,3,32"} <= found
    assert not {"64,32,128", "3,32,128", "64,64,32", "3,64,32", "64,1,128", "3,1,128"} & found
    after, _ = step(before, frozen, batch)
    changed = jax.tree.map(lambda a, b: bool((a != b).any()), before.tuned, after.tuned)
    for path, param in nnx.to_flat_state(changed):
        assert param.get_value() == (path[-1] == "b")  # A's gradient is 0 while B is 0
