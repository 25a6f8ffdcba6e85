"""What is counted in a traced program, and by arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.families import load_model_config
from esft_jax.ops.attention import causal_attention
from esft_jax.planning.operations import KernelRows, count_operations
from esft_jax.sharding import EXPERT, make_mesh
from esft_jax.training.operations import model_operations

ONE = KernelRows(np.array([1]), 0)


def test_loops_and_shares_of_devices_are_counted() -> None:
    mesh = make_mesh(data=1, expert=8)

    def step(x, w):
        def layer(x, w):
            return x @ w, None

        x, _ = jax.lax.scan(layer, x, w)  # 3 products of all devices together
        local = PartitionSpec(EXPERT)
        return jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=local, out_specs=local)(x)

    traced = jax.jit(step).trace(jnp.ones((16, 4)), jnp.ones((3, 4, 4)))
    found = count_operations(traced.jaxpr.jaxpr, ONE, 8)
    one, local = 2 * 16 * 4 * 4 / 8, 2 * 2 * 4 * 2
    assert found.products == found.total == 3 * one + local


# Of two blocks of queries, one meets one block of keys, one meets two. Of four that are about as
# long as the window, all but the first meet two; or three, if the oldest key lies before these.
@pytest.mark.parametrize(
    ("window", "block", "visits"), [(None, 512, 3), (256, 256, 7), (300, 256, 9), (600, 512, 3)]
)
def test_attention_is_charged_the_blocks_it_computes(window, block, visits) -> None:
    def gradients(query, key, value, segments):
        def loss(*arrays):
            out = causal_attention(*arrays, segments, 1.0, window=window, implementation="tpu")
            return out.sum()

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    length, heads, width, value_width = 1024, 3, 24, 16
    arrays = [jnp.ones((2, length, heads, w)) for w in (width, width, value_width)]
    traced = jax.jit(gradients).trace(*arrays, jnp.ones((2, length), jnp.int32))
    found = count_operations(traced.jaxpr.jaxpr, ONE, 1)
    # The first product comes again in both kernels of the backward pass, that of gradients and
    # values in both, too.
    scores = 2 * heads * visits * block**2
    assert found.attention == 2 * scores * (5 * width + 4 * value_width)


def test_a_group_is_charged_the_pieces_it_touches() -> None:
    # Tiles of 64 rows in pieces of 16: rows 0 to 19 touch two, rows 20 to 63 three.
    assert KernelRows(np.array([20, 44]), 0).charged(64) == (32 + 48) / 64


def test_operations_of_the_model_by_what_is_trained(base) -> None:
    config = load_model_config(base)
    top, bottom = config.moe_layers[-1], config.moe_layers[0]

    def operations(*layers: int, **flags: bool) -> float:
        return model_operations(config, ExpertConfig(dict.fromkeys(layers, (0,)), **flags), 64)

    # An expert's gradients, for the share of tokens that come to it.
    share = config.router.top_k / config.router.num_experts
    one = 2 * share * 3 * config.hidden_size * config.expert_width
    both, lowest = operations(bottom, top), operations(bottom)
    np.testing.assert_allclose(both - lowest, one)
    # Below the lowest trained layer nothing goes backwards.
    assert operations(top) < lowest < operations(bottom, also=("shared_experts",))
    everything = {layer: tuple(range(config.router.num_experts)) for layer in config.moe_layers}
    all_trained = ExpertConfig(everything, also=("shared_experts", "non_expert_modules"))
    assert model_operations(config, all_trained, 64) == model_operations(config, None, 64)
    # Each part takes what its weights take, once gradients reach the lowest layer.
    below = operations(bottom, also=("norms",))
    routers = operations(bottom, also=("norms", "router")) - below
    expected = 2 * len(config.moe_layers) * config.hidden_size * config.router.num_experts
    np.testing.assert_allclose(routers, expected)
    parts = ("shared_experts", "router", "attention", "dense_mlps", "embedding")
    each = [operations(bottom, also=("norms", part)) - below for part in parts]
    together = operations(bottom, also=("norms", *parts))
    np.testing.assert_allclose(together - below, sum(each))
    assert together == operations(bottom, also=("shared_experts", "non_expert_modules"))


def test_operations_of_low_rank_updates(base) -> None:
    config = load_model_config(base)
    top, bottom = config.moe_layers[-1], config.moe_layers[0]

    def operations(rank: int, *layers: int) -> float:
        experts = ExpertConfig(dict.fromkeys(layers, (0,)))
        return model_operations(config, LoRA(rank, 1.0, ("selected_experts",), experts), 64)

    # Forward, gradients of what factors meet and of their own, for the tokens that come to them.
    share = config.router.top_k / config.router.num_experts
    rank_one = 2 * 3 * share * 3 * (config.hidden_size + config.expert_width)
    np.testing.assert_allclose(operations(5, bottom) - operations(4, bottom), rank_one)
    np.testing.assert_allclose(operations(2, bottom, top) - operations(2, bottom), 2 * rank_one)
    assert operations(1, top) < operations(1, bottom) < operations(1000, bottom)
    # Only weights' gradients are spared.
    attention = model_operations(config, LoRA(1, 1.0, ("attention",), ExpertConfig({})), 64)
    assert operations(1, bottom) < attention < model_operations(config, None, 64)
