"""Each piece of the model alone, against transformers or a published definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from esft_jax.families import read_model_config
from esft_jax.model.config import NormConfig, RouterConfig
from esft_jax.model.norm import RMSNorm
from esft_jax.model.params import ParamFactory
from esft_jax.model.rope import inverse_frequencies, rotate, rotation
from esft_jax.model.router import Router, choose
from tests.checkpoint.checkpoints import SHAPE, torch_model
from tests.model.parity import V2, YARN, normal, run
from tests.yardstick import deepseek, torch

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def far_angles(pair):
    return pair.torch.model.rotary_emb(torch.zeros(1), torch.tensor(POSITIONS))


def causal_mask(length):
    return torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)


# Far apart, so that the slow pairs turn, too.
POSITIONS = np.array([[0, 1, 7, 300, 2500, 9000]] * 2, np.int32)


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norm(eps):
    x, scale = normal(2, 3, 8) * 0.1, normal(8, seed=1)
    ours = RMSNorm(8, NormConfig(eps), ParamFactory(nnx.Rngs(0), np.float32, 0.02))
    ours.scale[...] = scale
    theirs = deepseek.DeepseekV2RMSNorm(8, eps)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(scale))
        np.testing.assert_allclose(run(ours, x), theirs(torch.tensor(x)).numpy(), **CLOSE)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mscale": 1.0},
        {"mscale": 0.0, "mscale_all_dim": 0.0},
        {"factor": 4.0, "original_max_position_embeddings": 512, "beta_fast": 16, "beta_slow": 2},
        {"original_max_position_embeddings": 8, "beta_fast": 8, "beta_slow": 2},
    ],
    ids=["lite", "mscales-differ", "no-mscale", "other-ramp", "all-pairs-slow"],
)
def test_yarn_frequencies_and_scales(changes):
    dim = 64
    model = torch_model(
        rope_parameters=YARN | changes, qk_rope_head_dim=dim, max_position_embeddings=163840
    )
    config = read_model_config(model.config.to_dict())
    rope = config.rope
    frequencies, scale = ROPE_INIT_FUNCTIONS["yarn"](model.config)
    np.testing.assert_allclose(inverse_frequencies(rope), frequencies.numpy(), rtol=1e-6)
    assert rope.rotation_scale == pytest.approx(scale)
    theirs = model.model.layers[0].self_attn.scaling
    assert config.attention.scale == pytest.approx(theirs)


def test_plain_rope_frequencies():
    config = read_model_config(
        SHAPE | {"model_type": "deepseek_v2", "rope_parameters": None, "rope_theta": 500.0}
    )
    rope = config.rope
    expected = [500.0 ** -(i / 8) for i in (0, 2, 4, 6)]
    np.testing.assert_allclose(inverse_frequencies(rope), expected, rtol=1e-6)
    assert (rope.rotation_scale, config.attention.scale) == (1, 24**-0.5)


def test_rotation_of_queries(pair):
    x = normal(2, 6, 3, 8)
    rope = pair.config.rope

    @jax.jit
    def turn(x, positions):
        return rotate(x, *rotation(rope, positions), rope.pairing)

    turned = turn(x, POSITIONS)
    angles = far_angles(pair)
    query = torch.tensor(x).transpose(1, 2)
    expected, _ = deepseek.apply_rotary_emb(query, query, angles)
    np.testing.assert_allclose(turned, expected.transpose(1, 2).numpy(), atol=1e-4)


def test_attention(pair):
    x = normal(2, 6, pair.config.hidden_size)
    angles = far_angles(pair)
    ours = run(
        pair.jax_layer(1).attention,
        x,
        angles.real.numpy(),
        angles.imag.numpy(),
        np.ones((2, 6), np.int32),
    )
    with torch.no_grad():
        theirs, _ = pair.torch_layer(1).self_attn(
            torch.tensor(x),
            attention_mask=causal_mask(6),
            position_embeddings=angles,
        )
    np.testing.assert_allclose(ours, theirs.numpy(), **CLOSE)


def published_router(scores, raw):
    """Expert ids and gates by the published DeepSeek-V2 `MoEGate`, token by token."""
    ids, gates = [], []
    for row in scores.astype(np.float64):
        if raw["topk_method"] == "group_limited_greedy":
            groups = row.reshape(raw["n_group"], -1)
            closed = np.argsort(-groups.max(axis=1), kind="stable")[raw["topk_group"] :]
            groups = groups.copy()
            groups[closed] = 0
            row = groups.reshape(-1)
        best = np.argsort(-row, kind="stable")[: raw["num_experts_per_tok"]]
        weight = row[best]
        if raw["num_experts_per_tok"] > 1 and raw["norm_topk_prob"]:
            weight = weight / (weight.sum() + 1e-20)
        else:
            weight = weight * raw["routed_scaling_factor"]
        ids.append(best)
        gates.append(weight)
    return np.array(ids), np.array(gates)


@pytest.mark.parametrize("topk_method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_router_by_the_published_definition(topk_method, norm_topk_prob, top_k):
    raw = (
        SHAPE
        | V2
        | {
            "model_type": "deepseek_v2",
            "n_routed_experts": 16,
            "topk_method": topk_method,
            "norm_topk_prob": norm_topk_prob,
            "num_experts_per_tok": top_k,
        }
    )
    scores = np.exp(normal(40, 16))
    scores[0] = 1  # ties go to the lower expert
    scores /= scores.sum(axis=1, keepdims=True)
    config = read_model_config(raw).router
    ids, gates = jax.jit(lambda s: choose(s, None, config))(scores)
    expected_ids, expected_gates = published_router(scores, raw)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_allclose(gates, expected_gates, rtol=1e-5)


def test_router(pair):
    x = normal(24, pair.config.hidden_size)
    keep = np.arange(24) % 5 != 4
    ours = run(pair.jax_layer(2).moe.router, x, keep)
    with torch.no_grad():
        logits, gates, ids = pair.torch_layer(2).mlp.gate(torch.tensor(x))
    gates = np.take_along_axis(gates.numpy(), order := np.argsort(-gates.numpy(), axis=1), axis=1)
    ids = np.take_along_axis(ids.numpy(), order, axis=1)
    np.testing.assert_array_equal(ours.expert_ids[keep], ids[keep])
    np.testing.assert_allclose(ours.gates[keep], gates[keep], **CLOSE)
    np.testing.assert_allclose(ours.scores[keep], logits.softmax(dim=-1).numpy()[keep], **CLOSE)
    assert (ours.expert_ids[~keep] == pair.config.router.num_experts).all()
    assert not ours.gates[~keep].any() and not ours.scores[~keep].any()


def test_router_is_float32_whatever_the_activations_are(lite):
    router = lite.jax_layer(2).moe.router
    x = normal(24, lite.config.hidden_size).astype(jnp.bfloat16)
    weight = router.weight[...].astype(x.dtype)  # a trained one is saved in this type
    logits = np.asarray(x, np.float64) @ np.asarray(weight, np.float64)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(run(router, x, np.ones(24, bool)).scores, expected, **CLOSE)


def test_scales_of_experts_are_no_part_of_gates():
    """Scores are made of gates: gain of an expert says nothing of who chose it."""
    config = RouterConfig(6, 2, renormalise=True, input_norm=True, expert_scale=True)
    router = Router(8, config, ParamFactory(nnx.Rngs(0), np.float32, 0.5), 1e-6)
    scale = normal(6, seed=1)
    router.expert_scale.set_value(jnp.asarray(scale))
    routed = router(jnp.asarray(normal(5, 8)), jnp.arange(5) < 4)
    np.testing.assert_allclose(routed.gates.sum(axis=1), [1, 1, 1, 1, 0], rtol=1e-6)
    factors = router.factors(routed, jnp.dtype(jnp.float32))
    expected = np.append(scale, 0)[routed.expert_ids] * routed.gates
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


def moe(pair, x, keep):
    return run(pair.jax_layer(3).moe, x, x, keep, np.int32(0), None, None, None)[:2]


def test_moe_layer(pair):
    x, keep = normal(2, 6, pair.config.hidden_size), np.ones((2, 6), bool)
    ours, router = moe(pair, x, keep)
    with torch.no_grad():
        theirs = pair.torch_layer(3).mlp(torch.tensor(x)).numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-5, rtol=1e-5)
    assert router.expert_ids.shape == (2, 6, 3)


def test_padding_reaches_no_routed_expert(lite):
    x, keep = normal(2, 6, lite.config.hidden_size), np.ones((2, 6), bool)
    keep[1, 3:] = False
    whole, _ = moe(lite, x, np.ones_like(keep))
    found, _ = moe(lite, x, keep)
    np.testing.assert_allclose(found[keep], whole[keep], **CLOSE)
    shared = run(lite.jax_layer(3).moe.shared_experts, x)
    np.testing.assert_allclose(found[~keep], shared[~keep], **CLOSE)
    x[~keep] = np.nan
    poisoned, _ = moe(lite, x, keep)
    np.testing.assert_array_equal(poisoned[keep], found[keep])


def test_dense_layer(pair):
    x = normal(2, 6, pair.config.hidden_size)
    with torch.no_grad():
        theirs = pair.torch_layer(0).mlp(torch.tensor(x)).numpy()
    np.testing.assert_allclose(run(pair.jax_layer(0).mlp, x), theirs, **CLOSE)


@pytest.mark.parametrize("layer", [0, 1], ids=["dense", "moe"])
def test_whole_block(v2, layer):
    x, segments = normal(2, 6, v2.config.hidden_size), jnp.ones((2, 6), jnp.int32)
    angles = far_angles(v2)
    cos, sin = jnp.asarray(angles.real.numpy()), jnp.asarray(angles.imag.numpy())
    graph, params = nnx.split(v2.jax_layer(layer))

    @jax.jit
    def ours(params, x):
        block = nnx.merge(graph, params)
        x = x + block.attention(block.attention_norm(x), cos, sin, segments)
        if layer == 0:
            return x + block.mlp(block.ffn_norm(x))
        inner = block.ffn_norm(x)
        return x + block.moe(inner, x, segments > 0, jnp.int32(0), None, None, None)[0]

    with torch.no_grad():
        theirs = v2.torch_layer(layer)(
            torch.tensor(x), attention_mask=causal_mask(6), position_embeddings=angles
        )
    np.testing.assert_allclose(ours(params, x), theirs.numpy(), atol=2e-5, rtol=1e-5)
