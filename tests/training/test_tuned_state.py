"""What the released expert configurations cost beside the frozen DeepSeek-V2-Lite."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.families import load_model_config
from esft_jax.model import Transformer
from esft_jax.optimizer_config import OptimizerConfig
from esft_jax.sharding import make_mesh
from esft_jax.training.optimizer import make_optimizer
from esft_jax.training.state import init_state, state_shardings

CONFIG = load_model_config(Path(__file__).parents[2] / "models" / "deepseek-v2-lite")
EXPERT_SIZE = 3 * CONFIG.hidden_size * CONFIG.expert_width


@pytest.mark.parametrize("task", ["intent", "law"])
# On a mesh, all devices' shares are as long as the longest.
@pytest.mark.parametrize(("devices", "most"), [(1, 1.001), (2, 1.01), (8, 1.05)])
def test_masters_and_moments_are_those_of_the_tuned_experts(esft_reference, task, devices, most):
    path = esft_reference / "results" / "expert_configs" / f"{task}.json"
    experts = ExpertConfig.load(path)
    mesh = make_mesh(expert=devices, devices=jax.devices()[:devices])

    def start():
        model = Transformer(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, mesh=mesh)
        attach_tuned_experts(model, experts)
        _, tuned, frozen = partition(model, experts)
        return init_state(make_optimizer(OptimizerConfig(), steps=1), tuned, frozen)

    state = jax.eval_shape(start)
    shardings = state_shardings(state, mesh)
    per_device = sum(
        leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape))
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
    )
    # A master and two moments, all float32.
    exact = 3 * 4 * experts.num_experts_selected * EXPERT_SIZE
    assert exact <= devices * per_device < most * exact
