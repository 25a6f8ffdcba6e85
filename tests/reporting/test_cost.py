"""Parameters, bytes and operations of a choice."""

import jax
import numpy as np
from flax import nnx

from esft_jax.families import load_model_config
from esft_jax.model import Transformer
from esft_jax.reporting.cost import CostModel
from esft_jax.training.operations import model_operations


def test_costs_of_a_choice(base) -> None:
    config = load_model_config(base)
    costs = CostModel(config, 64)
    state = nnx.state(Transformer(config, rngs=nnx.Rngs(0)), nnx.Param)
    assert costs.full.parameters == sum(leaf.size for leaf in jax.tree.leaves(state))
    assert costs.full.operations == model_operations(config, None, 64)
    layers, experts = len(config.moe_layers), config.router.num_experts
    token = np.full((layers, experts), 1 / experts)
    chosen = np.zeros((layers, experts), bool)
    chosen[-1, :2] = True
    cost = costs.of(chosen, token)
    one = 3 * config.hidden_size * config.expert_width
    assert cost.parameters == 2 * one
    assert (cost.adapter_bytes, cost.state_bytes) == (2 * 2 * one, 16 * 2 * one)
    assert cost.operations < costs.full.operations
    # With everything, it is all but the other experts.
    everything = costs.of(chosen, token, also=("shared_experts", "non_expert_modules"))
    assert everything.parameters == costs.full.parameters - (layers * experts - 2) * one
    assert cost.operations < everything.operations < costs.full.operations


def test_an_expert_is_charged_for_what_it_serves(base) -> None:
    config = load_model_config(base)
    costs = CostModel(config, 64)
    layers, experts = len(config.moe_layers), config.router.num_experts
    chosen = np.zeros((layers, experts), bool)
    chosen[:, 0] = True
    rare, frequent = np.zeros((2, layers, experts))
    rare[:, 0], frequent[:, 0] = 0.1, 0.6
    more = costs.of(chosen, frequent).operations - costs.of(chosen, rare).operations
    assignments = config.router.top_k * layers * 0.5
    np.testing.assert_allclose(more, 2 * assignments * 3 * config.hidden_size * config.expert_width)
