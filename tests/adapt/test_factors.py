"""Low-rank updates: where their rows lie, what they compute, on one device and on eight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esft_jax.adapt.attach import attach
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.adapt.partition import partition
from esft_jax.adapt.slots import LowRankLayout
from esft_jax.errors import InputError
from esft_jax.families import read_model_config
from esft_jax.model import Transformer
from esft_jax.sharding import make_mesh, param_shardings, place_batch
from esft_jax.training.step import token_loss
from tests.adapt.test_tuned import LAYOUTS
from tests.checkpoint.checkpoints import SHAPE

CONFIG = read_model_config(SHAPE | {"model_type": "deepseek_v2"})
SELECTED = ExpertConfig({1: (5, 0, 1), 2: (3,)})
MODULES = ("attention", "dense_mlps", "shared_experts")


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
@pytest.mark.parametrize("selected", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("loaded", [False, True])
def test_rows_update_experts_of_their_device(selected, shards, loaded):
    loads = np.random.default_rng(0).random((3, 8)) if loaded else None
    layout = LowRankLayout.place(selected, 8, shards, loads)
    local, size = 8 // shards, layout.rows_per_shard
    first = next(i for i, ids in enumerate(selected) if ids)
    for layer, positions in enumerate(layout.placement.positions):
        assert sorted(positions) == list(range(8))
        if layer < first or shards == 1:  # read without a layout; nothing to deal out
            assert positions == tuple(range(8))
    # Every expert is computed on one device, as what lies in its place there.
    owners = (layout.groups[:, :, :8] < local).sum(axis=0)
    assert (owners == 1).all() and (layout.groups[:, :, 8] == local).all()
    sources = layout.sources
    if sources is None:
        sources = np.broadcast_to(np.arange(local), (shards, 3, local))
    updated = set()
    for layer, expert, row in layout.rows():
        shard, within = divmod(row, size)
        assert layout.placement.positions[layer][expert] // local == shard
        place = within - layout.window_starts[shard, layer]
        assert sources[shard, layer, place] == layout.groups[shard, layer, expert]
        updated.add((shard, layer, place))
    for index in np.ndindex(sources.shape):
        assert (sources[index] < local) == (index in updated)
    assert size == -(-sum(map(len, selected)) // shards)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_rows_of_all_experts_need_no_table(shards, loaded):
    loads = np.random.default_rng(0).random((3, 8)) if loaded else None
    layout = LowRankLayout.place(LAYOUTS["all"], 8, shards, loads)
    assert layout.sources is None
    assert loaded or layout.placement.positions == (tuple(range(8)),) * 3


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(np.asarray, nnx.state(Transformer(CONFIG, rngs=nnx.Rngs(0))))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(4)
    tokens, targets = rng.integers(1, 96, (2, 8, 12)).astype(np.int32)
    segments = np.ones((8, 12), np.int32)
    segments[2, 4:] = 0
    return {
        "tokens": tokens,
        "targets": targets,
        "segment_ids": segments,
        "positions": np.tile(np.arange(12, dtype=np.int32), (8, 1)),
        "loss_weights": (segments > 0).astype(np.float32),
    }


def shifted(tuned, by):
    """B are 0 at first, and so would be the gradients of A."""
    return nnx.map_state(lambda path, f: f.replace(f.get_value() + by * (path[-1] == "b")), tuned)


def with_factors(params, targets, mesh=None, transport="all_gather", rank=3):
    """A model whose B are not 0; parts as `partition` gives them."""
    model = nnx.eval_shape(
        lambda: Transformer(CONFIG, rngs=nnx.Rngs(0), mesh=mesh, transport=transport)
    )
    graph = nnx.graphdef(model)
    places = param_shardings(params, mesh)
    model = nnx.merge(graph, jax.tree.map(jax.device_put, params, places))
    lora = LoRA.on(CONFIG, rank, 2.0 * rank, targets, SELECTED)
    attach(model, lora, seed=0)
    graph, tuned, frozen = partition(model, lora)
    return graph, shifted(tuned, 0.05), frozen


def gradients(params, batch, targets, mesh, transport="all_gather"):
    """Loss, and gradients of factors, those of experts by (layer, expert)."""
    graph, tuned, frozen = with_factors(params, targets, mesh, transport)

    def loss(tuned, frozen, batch):
        return token_loss(nnx.merge(graph, tuned, frozen), batch)[0]

    found = jax.jit(jax.value_and_grad(loss))(tuned, frozen, place_batch(batch, mesh))
    by_path = {}
    for path, value in nnx.to_flat_state(found[1]):
        value = np.asarray(value.get_value())
        if path[0] != "tuned_experts":
            by_path[path] = value
            continue
        for layer, expert, row in nnx.merge(graph, tuned, frozen).tuned_experts.layout.rows():
            by_path[(*path, layer, expert)] = value[row]
    return found[0], by_path


@pytest.mark.slow  # a run on two meshes is compared in tests/training/test_lora_run.py
@pytest.mark.parametrize(
    ("targets", "mesh", "transport"),
    [
        ((*MODULES, "selected_experts"), (2, 4), "all_gather"),
        ((*MODULES, "selected_experts"), (1, 8), "all_gather"),
        ((*MODULES, "experts"), (2, 4), "all_gather"),
        (("selected_experts",), (4, 2), "all_gather"),
        (("selected_experts",), (2, 4), "ragged_all_to_all"),
        (("shared_experts",), (8, 1), "all_gather"),
    ],
)
def test_a_mesh_changes_nothing(params, batch, targets, mesh, transport):
    loss, alone = gradients(params, batch, targets, None)
    shared_loss, split = gradients(params, batch, targets, make_mesh(*mesh), transport)
    np.testing.assert_allclose(shared_loss, loss, rtol=1e-6)
    assert split.keys() == alone.keys()
    for path, expected in alone.items():
        scale = np.abs(expected).max()
        assert scale > 0
        np.testing.assert_allclose(split[path] / scale, expected / scale, atol=1e-5, err_msg=path)


def test_updates_of_zero_change_nothing_and_decoding_has_them(params, batch):
    tokens = jnp.asarray(batch["tokens"])
    graph, tuned, frozen = with_factors(params, (*MODULES, "selected_experts"))

    @jax.jit
    def both(tuned, frozen):
        model = nnx.merge(graph, tuned, frozen)
        positions = jnp.tile(jnp.arange(12), (8, 1))
        keep = jnp.ones_like(tokens, bool)
        decoded, _ = model.decode(tokens, positions, keep, model.init_cache(8, 12))
        return model(tokens).logits, decoded

    whole, decoded = both(tuned, frozen)
    np.testing.assert_allclose(decoded, whole, atol=1e-4)
    nothing = shifted(tuned, -0.05)
    plain = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: Transformer(CONFIG, rngs=nnx.Rngs(0)))), params
    )
    expected = nnx.jit(lambda model, tokens: model(tokens).logits)(plain, tokens)
    np.testing.assert_allclose(both(nothing, frozen)[0], expected, atol=1e-5)
    assert np.abs(whole - expected).max() > 0.1


def test_a_model_without_the_targets_is_refused():
    config = read_model_config(SHAPE | {"model_type": "deepseek_v2", "first_k_dense_replace": 0})
    with pytest.raises(InputError, match=r"lora.targets: the model has no dense_mlps"):
        LoRA.on(config, 8, 16.0, ("dense_mlps",), None)
