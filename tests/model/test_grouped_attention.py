"""Switches of grouped-query attention, against modules of transformers that have them."""

from functools import partial
from importlib import import_module

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx

from esft_jax.model.attention.core import attend
from esft_jax.model.attention.gqa import GroupedAttention
from esft_jax.model.config import GroupedAttentionConfig, NormConfig, RopeConfig
from esft_jax.model.params import ParamFactory, Role
from esft_jax.sharding import make_mesh
from tests.model.parity import normal, run
from tests.yardstick import torch

SIZE, HEADS, KEY_HEADS, HEAD, WINDOW = 40, 6, 2, 12, 5
SHAPE = {
    "hidden_size": SIZE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEY_HEADS,
    "head_dim": HEAD,
    "num_hidden_layers": 2,
}
PLAIN = {
    "heads": HEADS,
    "key_heads": KEY_HEADS,
    "head": HEAD,
    "input_bias": False,
    "output_bias": False,
    "norm": "head",
    "norm_first": True,
    "clip": None,
    "scale": HEAD**-0.5,
}
# A module, its configuration, keys of that, and our switches.
CASES = {
    "window, sinks": (
        "gpt_oss.modeling_gpt_oss.GptOssAttention",
        "gpt_oss",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": WINDOW,
            "attention_bias": True,
        },
        {
            "window": WINDOW,
            "sinks": True,
            "input_bias": True,
            "output_bias": True,
            "norm": "none",
        },
    ),
    "output gate": (
        "qwen3_next.modeling_qwen3_next.Qwen3NextAttention",
        "qwen3_next",
        {"attention_bias": True},
        {"output_gate": True, "input_bias": True, "output_bias": True},
    ),
    "shared values": (
        "gemma4.modeling_gemma4.Gemma4TextAttention",
        "gemma4_text",
        {
            "layer_types": ["full_attention", "full_attention"],
            "attention_k_eq_v": True,
            "global_head_dim": HEAD,
            "num_global_key_value_heads": KEY_HEADS,
            "attention_bias": True,
            "num_kv_shared_layers": 0,
        },
        {
            "shared_values": True,
            "value_norm": True,
            "scale": 1.0,
            "input_bias": True,
            "output_bias": True,
        },
    ),
    "window, value norm": (
        "gemma4.modeling_gemma4.Gemma4TextAttention",
        "gemma4_text",
        {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": WINDOW,
            "num_kv_shared_layers": 0,
        },
        {"window": WINDOW, "value_norm": True, "scale": 1.0},
    ),
}
# Documents shorter and longer than the window, padding, and a number that comes back.
SEGMENTS = np.array([[1] * 3 + [2] * 11 + [0] * 2, [1] * 7 + [2] * 7 + [1] * 2], np.int32)
LENGTH = SEGMENTS.shape[1]


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """A module of transformers with random weights, and ours with the same."""
    make, family, keys, switches = CASES[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SHAPE | keys))
    config._attn_implementation = "eager"
    module, _, name = make.rpartition(".")
    theirs = getattr(import_module(f"transformers.models.{module}"), name)(config, 0).eval()
    attention = GroupedAttentionConfig(**(PLAIN | switches))
    norm = NormConfig(config.rms_norm_eps, offset="qwen" in family)
    rope = RopeConfig(10000.0, HEAD, "half")
    params = ParamFactory(nnx.Rngs(0), np.float32, 0.02)
    ours = GroupedAttention(SIZE, attention, rope, params, norm)
    names = {"o_proj.weight": "out", "o_proj.bias": "out_bias"}
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            weight.normal_(1 if weight.ndim == 1 else 0, 0.4)
            path = names.get(name, name).removesuffix(".weight").replace("_proj", "")
            module, leaf = ours, path.replace(".bias", "_bias")
            if "norm" in leaf:
                module, leaf = getattr(ours, leaf), "scale"
            getattr(module, leaf)[...] = weight.numpy().T
    found = nnx.to_flat_state(nnx.state(ours, nnx.Param))
    assert len(found) == len([*theirs.parameters()])
    return theirs, ours


def angles(positions):
    """Cosines and sines `[B, S, P]`."""
    turned = positions[..., None] * 10000.0 ** (-np.arange(0, HEAD, 2) / HEAD)
    return np.cos(turned).astype(np.float32), np.sin(turned).astype(np.float32)


def expected(theirs, x, cos, sin, segments):
    index = np.arange(x.shape[1])
    distance = index[:, None] - index
    seen = (segments[:, :, None] == segments[:, None]) & (distance >= 0)
    if getattr(theirs, "sliding_window", None):
        seen &= distance < WINDOW
    mask = torch.where(torch.tensor(seen[:, None]), 0.0, torch.finfo(torch.float32).min)
    if type(theirs).__name__ != "GptOssAttention":  # which takes each angle once
        cos, sin = (np.concatenate([a, a], axis=-1) for a in (cos, sin))
    rotation = torch.tensor(cos), torch.tensor(sin)
    more = {"shared_kv_states": {}} if hasattr(theirs, "is_kv_shared_layer") else {}
    with torch.no_grad():
        out, _ = theirs(torch.tensor(x), position_embeddings=rotation, attention_mask=mask, **more)
    return out.numpy()


def test_packed_rows_are_those_of_transformers(pair):
    theirs, ours = pair
    x = normal(2, LENGTH, SIZE)
    rotation = angles(np.arange(LENGTH)[None] * np.array([[1], [37]]))
    wanted = expected(theirs, x, *rotation, SEGMENTS)
    np.testing.assert_allclose(run(ours, x, *rotation, SEGMENTS), wanted, atol=2e-5)


def test_decoding_is_that_of_transformers(pair):
    theirs, ours = pair
    x = normal(2, LENGTH, SIZE)
    positions = np.broadcast_to(np.arange(LENGTH), (2, LENGTH))
    cos, sin = angles(positions)
    wanted = expected(theirs, x, cos, sin, np.ones_like(SEGMENTS))
    cache, parts = GroupedAttention.empty_cache(ours.config, (2, LENGTH + 3), jnp.float32), []
    for begin, end in ((0, 9), (9, 10), (10, LENGTH)):
        given = (x, cos, sin, positions, np.ones((2, LENGTH), bool))
        part = (jnp.asarray(a[:, begin:end]) for a in given)
        out, cache = ours.decode(*part, cache)
        parts.append(out)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), wanted, atol=2e-5)


def test_roles_and_matrices(pair):
    """Sinks are trained with attention; low-rank updates are for the matrices that there are."""
    _, ours = pair
    params = {name: p for name, p in nnx.state(ours, nnx.Param).items() if "norm" not in name}
    assert {p.role for p in params.values()} == {Role.ATTENTION}
    assert {name for name, p in params.items() if p.get_value().ndim == 2} == set(ours.matrices)
    assert ("v" in params, "sinks" in params) == (not ours.config.shared_values, ours.config.sinks)


def test_sinks_get_the_gradients_of_all_devices():
    heads = HEADS, KEY_HEADS, KEY_HEADS
    query, key, value = (
        jnp.asarray(normal(8, 10, count, HEAD, seed=seed)) for seed, count in enumerate(heads)
    )
    segments = jnp.ones((8, 10), np.int32)

    def loss(sinks, mesh):
        return (attend(query, key, value, segments, 1.0, mesh, 4, sinks) ** 2).sum()

    alone, together = (
        jax.jit(jax.grad(partial(loss, mesh=mesh)))(normal(HEADS))
        for mesh in (None, make_mesh(data=2, expert=4))
    )
    assert np.abs(alone).min() > 0
    np.testing.assert_allclose(together, alone, rtol=1e-5)
