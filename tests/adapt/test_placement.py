from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.placement import expected_loads, place_experts
from esft_jax.families import read_model_config
from esft_jax.model import Transformer
from esft_jax.routing.scores import load_scores
from esft_jax.sharding import make_mesh, param_shardings
from tests.checkpoint.checkpoints import SHAPE


@pytest.mark.parametrize("task", ["intent", "law"])
@pytest.mark.parametrize("shards", [4, 8])
def test_released_configurations_are_balanced(task: str, shards: int, esft_reference: Path) -> None:
    results = esft_reference / "results"
    scores = load_scores(results / "expert_scores" / task)
    experts = ExpertConfig.load(results / "expert_configs" / f"{task}.json")
    selected = [tuple(sorted(experts.experts.get(layer, ()))) for layer in scores.layers]
    placement = place_experts(selected, 64, shards, scores.token)
    rows = np.bincount(np.concatenate([np.array(o, int) for o in placement.owners]))
    assert rows.size == shards and rows.max() - rows.min() <= 1
    loads = expected_loads(placement, selected, shards, scores.token)
    assert loads.max() <= {4: 1.02, 8: 1.05}[shards]
    before = expected_loads(place_experts(selected, 64, shards), selected, shards, scores.token)
    assert before.max() > 1.25


@pytest.mark.parametrize("ids", [(), (0, 1, 2), (3,), tuple(range(8))])
def test_every_expert_has_a_place_and_tuned_ones_are_shared_out(ids: tuple[int, ...]) -> None:
    loads = np.random.default_rng(0).dirichlet(np.ones(8), 2)
    selected = [ids, (5, 7)]
    placement = place_experts(selected, 8, 4, loads)
    for positions in placement.positions:
        assert sorted(positions) == list(range(8))
    for owners in placement.owners:
        assert np.ptp(np.bincount(owners, minlength=4)) <= 1
    # By hand: tuned experts count where their rows are, others where they lie in the stack.
    expected = np.zeros((2, 4))
    for layer, chosen in enumerate(selected):
        for expert in range(8):
            device = placement.positions[layer][expert] // 2
            if expert in chosen:
                device = placement.owners[layer][chosen.index(expert)]
            expected[layer, device] += loads[layer, expert] * 4
    found = expected_loads(placement, selected, 4, loads)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("shards", [2, 4])
def test_moved_experts_compute_the_same(shards: int) -> None:
    config = read_model_config(SHAPE | {"model_type": "deepseek_v2"})
    mesh = make_mesh(expert=shards)
    tokens = np.random.default_rng(1).integers(1, 96, (8, 12)).astype(np.int32)
    layers, num_experts = len(config.moe_layers), config.router.num_experts
    loads = np.random.default_rng(2).dirichlet(np.ones(num_experts), layers)
    experts = ExpertConfig({config.moe_layers[-1]: (0, 3, 4)})

    def model() -> Transformer:
        graph, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0), mesh=mesh))
        return nnx.merge(graph, jax.device_put(state, param_shardings(state, mesh)))

    plain, moved = model(), model()
    attach_tuned_experts(plain, experts)
    attach_tuned_experts(moved, experts, loads)
    assert moved.tuned_experts.layout.placement != plain.tuned_experts.layout.placement
    assert moved.tuned_experts.layout.placement.positions[0] == tuple(range(num_experts))
    before = np.asarray(plain.moe_blocks.moe.experts.down[...])
    after = np.asarray(moved.moe_blocks.moe.experts.down[...])
    assert (before != after).any()
    for layer, positions in enumerate(moved.tuned_experts.layout.placement.positions):
        np.testing.assert_array_equal(after[layer, list(positions)], before[layer])
    run = nnx.jit(lambda model, tokens: model(tokens))
    expected, found = run(plain, tokens), run(moved, tokens)
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    np.testing.assert_array_equal(found.router.expert_ids, expected.router.expert_ids)
