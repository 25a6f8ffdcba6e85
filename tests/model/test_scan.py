"""Decoders whose layers have two kinds of attention, against the same layers one by one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.model.config import (
    GroupedAttentionConfig,
    LayerRun,
    ModelConfig,
    RopeConfig,
    RouterConfig,
    SecondAttention,
)
from esft_jax.model.rope import rotation
from esft_jax.model.scan import _repeating
from esft_jax.model.transformer import Transformer
from tests.model.parity import run

FIRST = GroupedAttentionConfig(
    heads=4,
    key_heads=2,
    head=6,
    input_bias=True,
    output_bias=False,
    norm="head",
    norm_first=True,
    clip=None,
    scale=0.4,
)
SECOND = replace(FIRST, heads=3, key_heads=1, head=10, input_bias=False, scale=0.3)


def make_config(layers: int, dense: tuple[int, ...], second: tuple[int, ...]) -> ModelConfig:
    rope = RopeConfig(100.0, 6, "half")
    return ModelConfig(
        vocab_size=31,
        hidden_size=16,
        num_layers=layers,
        moe_layers=tuple(n for n in range(layers) if n not in dense),
        dense_width=20,
        expert_width=12,
        shared_width=0,
        shared_gate=False,
        attention=FIRST,
        rope=rope,
        router=RouterConfig(num_experts=4, top_k=2),
        norm_eps=1e-6,
        tie_embeddings=False,
        max_positions=64,
        second=SecondAttention(second, SECOND, replace(rope, theta=30.0, rotated=4)),
        norm_offset=True,
        init_std=0.3,
        family="qwen3_moe",
    )


# Three to one with some left over; a dense layer of each kind; no pattern at all.
CONFIGS = {
    "repeated": make_config(10, (), (3, 7)),
    "dense": make_config(7, (0, 1, 4), (1, 2, 5)),
    "uneven": make_config(6, (5,), (0, 2, 3)),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    made = Transformer(CONFIGS[request.param], rngs=nnx.Rngs(3))
    params = nnx.state(made, nnx.Param)
    noise = np.random.default_rng(0)
    nnx.update(made, jax.tree.map(lambda p: p + 0.1 * noise.normal(size=p.shape), params))
    return made


def one_by_one(model, tokens):
    """Logits, each layer taken out of its stack."""
    config = model.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments = jnp.ones_like(tokens)
    x = model.embedding[...][tokens]
    for layer in range(config.num_layers):
        moe, row = config.place(layer)
        kind, stack = config.kind(layer), model.moe_blocks if moe else model.dense_blocks
        own = config.kinds(moe)[:row].count(kind)
        graph, params = nnx.split(stack.attentions[kind])
        attention = nnx.merge(graph, jax.tree.map(lambda p, own=own: p[own], params))
        cut = {
            name: nnx.merge(*_cut(module, row))
            for name in ("attention_norm", "ffn_norm", "moe" if moe else "mlp")
            for module in [getattr(stack, name)]
        }
        turn = rotation(config.attentions[kind][1], positions)
        x = x + attention(cut["attention_norm"](x), *turn, segments)
        inner = cut["ffn_norm"](x)
        if moe:
            out, *_ = cut["moe"](inner, x, segments > 0, jnp.int32(0), None, None, None)
        else:
            out = cut["mlp"](inner)
        x = x + out
    return model.logits(model.norm(x))


def _cut(module, row):
    graph, params = nnx.split(module)
    return graph, jax.tree.map(lambda p: p[row], params)


TOKENS = np.random.default_rng(1).integers(0, 31, (2, 8))


@pytest.fixture(scope="module")
def output(model):
    return run(model, TOKENS)


def test_a_scan_computes_its_layers_in_order(model, output):
    np.testing.assert_allclose(output.logits, one_by_one(model, TOKENS), atol=2e-5)
    assert output.router.expert_ids.shape == (len(model.config.moe_layers), 2, 8, 2)


def test_decoding_keeps_a_cache_of_each_kind(model, output):
    graph, params = nnx.split(model)
    decode = jax.jit(lambda params, *xs: nnx.merge(graph, params).decode(*xs))
    caches, parts = model.init_cache(2, 12), []
    kinds = [model.config.kind(layer) for layer in range(model.config.num_layers)]
    assert [cache.key.shape[0] for cache in caches] == [kinds.count(0), kinds.count(1)]
    for begin in (0, 4):
        positions = np.broadcast_to(np.arange(begin, begin + 4), (2, 4))
        part = TOKENS[:, begin : begin + 4]
        logits, caches = decode(params, part, positions, np.ones((2, 4), bool), caches)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), output.logits, atol=2e-5)


@pytest.mark.parametrize("remat", ["full", "offload"])
def test_gradients_of_tuned_experts_are_those_of_all_experts(model, remat):
    layers = model.config.moe_layers[1], model.config.moe_layers[-1]
    experts = ExpertConfig({layers[0]: (1,), layers[1]: (0, 3)})
    graph, params = nnx.split(model)

    def loss(params):
        full = nnx.merge(graph, params)
        full.experts_learn = True
        return jnp.sin(full(TOKENS).logits).sum()

    every = jax.jit(jax.grad(loss))(params)["moe_blocks"]["moe"]["experts"]
    tuned_model = nnx.merge(graph, params)
    tuned_model.remat = remat
    attach_tuned_experts(tuned_model, experts)
    tuned_graph, tuned, frozen = partition(tuned_model, experts)

    def tuned_loss(tuned):
        return jnp.sin(nnx.merge(tuned_graph, tuned, frozen)(TOKENS).logits).sum()

    found = jax.jit(jax.grad(tuned_loss))(tuned)["tuned_experts"]
    for row, expert, slot in tuned_model.tuned_experts.layout.rows():
        for name in ("gate_up", "down"):
            expected = every[name][...][row, expert]
            np.testing.assert_allclose(found[name][...][slot], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("kinds", "patterns"),
    [
        ("0001000100", ["0001" * 2, "00"]),
        ("0000", ["0000"]),
        ("0110", ["011", "0"]),
        ("10", ["10"]),
        ("", []),
    ],
)
def test_a_run_is_cut_where_its_pattern_ends(kinds, patterns):
    kinds = tuple(map(int, kinds))
    parts = _repeating(LayerRun(True, 5, 5 + len(kinds), 9), kinds)
    found = ["".join(map(str, pattern * (run.size // len(pattern)))) for run, pattern in parts]
    assert found == patterns
    ends = [run.stop for run, _ in parts]
    assert [run.start for run, _ in parts] == [5, *ends[:-1]][: len(parts)]
    assert [run.first - run.start for run, _ in parts] == [4] * len(parts)
