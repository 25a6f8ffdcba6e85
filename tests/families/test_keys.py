"""Keys of `config.json`: absent ones, other spellings, and those that no family knows."""

import dataclasses

import pytest
import transformers

from esft_jax.errors import InputError
from esft_jax.families import FAMILIES, read_model_config
from esft_jax.model.config import LatentAttentionConfig

GEMMA4 = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 16,
    "hidden_size_per_layer_input": 0,
}
# Where the defaults of a class of transformers describe no whole model.
MORE = {
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": None},
    "gemma4": {"text_config": GEMMA4, "vision_config": None, "audio_config": None},
    "gemma4_text": GEMMA4,
    "glm4_moe": {"num_attention_heads": 32},
}
FAMILY_NAMES = sorted(FAMILIES.keys() - {"kimi_k2"})  # which is deepseek_v3 by another name
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def full(family, **changes):
    """All keys at the defaults of transformers."""
    config = transformers.AutoConfig.for_model(family, **MORE.get(family, {}), **changes)
    return config.to_dict() | {"model_type": family}


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_an_absent_key_means_what_it_does_to_transformers_or_is_refused_by_name(family):
    raw = full(family)
    expected, refused = read_model_config(raw), set()
    for key in raw.keys() - {"model_type"}:
        try:
            found = read_model_config({k: v for k, v in raw.items() if k != key})
        except InputError as error:
            assert str(error).startswith(f"{key}: None; expected"), key
            refused.add(key)
        else:
            assert dataclasses.asdict(found) == dataclasses.asdict(expected), key
    assert ({"text_config"} if "text_config" in raw else {"vocab_size", "hidden_size"}) <= refused
    assert len(refused) < 15


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite", "sarvam_mla"])
def test_null_is_no_rank_of_queries(family):
    attention = read_model_config(full(family) | {"q_lora_rank": None}).attention
    assert isinstance(attention, LatentAttentionConfig)
    assert attention.query_rank is None


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("layer_types", ["full_attention"], "for each of num_hidden_layers = "),
        ("layer_types", "full", "for each of num_hidden_layers = "),
        ("linear_num_value_heads", 17, "is no multiple of linear_num_key_heads = 16"),
        ("attn_output_gate", False, "is not supported; expected True"),
        ("output_gate_type", "sigmoid", "is not supported; expected 'swish'"),
        ("hidden_act", "gelu", "is not supported; expected 'silu'"),
    ],
)
def test_what_linear_attention_does_not_know_is_refused(family, key, value, message):
    with pytest.raises(InputError, match=f"{key}: .*{message}"):
        read_model_config(full(family) | {key: value})


def test_layers_are_spelled_in_two_ways():
    raw = full("qwen3_next") | {"full_attention_interval": 3}
    spaced = read_model_config({k: v for k, v in raw.items() if k != "layer_types"})
    assert spaced.second.layers == tuple(range(2, 48, 3))
    assert read_model_config(raw).second.layers == tuple(range(3, 48, 4))
    alike = read_model_config(raw | {"layer_types": ["full_attention"] * 48})
    assert alike.second is None
    assert alike.attention == spaced.second.attention


def test_text_of_qwen3_5_turns_as_without_sections_of_positions():
    raw = full("qwen3_5_moe_text")
    sections = {"mrope_section": [11, 11, 10], "mrope_interleaved": True}
    given = raw | {"rope_parameters": raw["rope_parameters"] | sections}
    assert read_model_config(given) == read_model_config(raw)
    whole = full("qwen3_5_moe")
    beside = read_model_config(whole)
    assert beside.fingerprint == read_model_config(raw).fingerprint
    assert beside.carried == ("mtp.", "model.visual.")
    with pytest.raises(InputError, match="tie_word_embeddings: says something else"):
        read_model_config(whole | {"tie_word_embeddings": True})


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_hunyuan_stretches_the_base_by_a_fixed_alpha(key):
    """As the release of Hunyuan-A13B spells it."""
    plain = full("hunyuan_v1_moe", head_dim=128) | {"rope_parameters": None}
    scaling = {key: "dynamic", "alpha": 1000.0, "factor": 1.0, "beta_fast": 32, "mscale": 1.0}
    found = read_model_config(plain | {"rope_theta": 10000.0, "rope_scaling": scaling}).rope
    expected = dataclasses.replace(found, theta=10000.0 * 1000.0 ** (128 / 126), yarn=None)
    assert found == expected
    both = scaling | {"type": "dynamic", "rope_type": "dynamic", "rope_theta": 10000.0}
    assert read_model_config(plain | {"rope_parameters": both}).rope == found


def test_yarn_extends_the_longest_row_unless_it_says_otherwise():
    raw = full("qwen3_moe") | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}
    rope = read_model_config(raw).rope
    assert rope.yarn.original_context == raw["max_position_embeddings"]
    beside = raw | {"original_max_position_embeddings": 64}
    assert read_model_config(beside).rope.yarn.original_context == 64
    beside["rope_parameters"] = raw["rope_parameters"] | {"original_max_position_embeddings": 128}
    with pytest.raises(InputError, match="original_max_position_embeddings: 128 and 64; expected"):
        read_model_config(beside)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"full_attention": {"rope_theta": 1e6}}, "rope_parameters.full_attention: {'rope_theta'"),
        ({"rope_type": "yarn", **YARN, "attn_factor": 2.0}, "rope_parameters.attn_factor: 2.0 is"),
        ({"rope_type": "default", "alpha": 8.0}, "rope_parameters.alpha: 8.0 is not supported"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_parameters.rope_type: 'llama3'; expected"),
    ],
)
def test_what_rope_does_not_know_is_refused(rope, message):
    with pytest.raises(InputError, match=message):
        read_model_config(full("qwen3_moe") | {"rope_parameters": rope})


def test_half_a_pair_is_refused_by_its_key():
    with pytest.raises(InputError, match="partial_rotary_factor: 0.5 turns 3 features of a head"):
        read_model_config(full("glm4_moe") | {"head_dim": 6})


SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("family", "changes", "window", "second"),
    [
        ("mixtral", {"sliding_window": 9}, 9, None),
        ("mixtral", {"sliding_window": None}, None, None),
        ("qwen3_moe", {"use_sliding_window": True}, 4096, None),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}, None, None),
        ("qwen2_moe", {"use_sliding_window": True}, None, ((0, 2), 4096)),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 2}, None, ((0,), 4096)),
        ("dots1", {"max_window_layers": 1, "sliding_window": 9}, None, ((1, 2), 9)),
        ("dots1", {"max_window_layers": 1, "sliding_window": None}, None, None),
        ("dots1", {"layer_types": [SLIDING] * 3}, 4096, None),
        ("dots1", {"layer_types": [FULL, SLIDING, FULL]}, None, ((1,), 4096)),
    ],
)
def test_which_layers_have_windows(family, changes, window, second):
    raw = full(family, num_hidden_layers=3) | {"layer_types": None, "sliding_window": 4096}
    config = read_model_config(raw | changes)
    assert config.attention.window == window
    if second is None:
        assert config.second is None
    else:
        assert (config.second.layers, config.second.attention.window) == second


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mixtral", {"sliding_window": 0}, "sliding_window: 0; expected an integer from 1"),
        ("qwen2_moe", {"layer_types": [SLIDING] * 3}, "layer_types: .*use_sliding_window = true"),
        ("qwen3_moe", {"layer_types": [SLIDING] * 3}, "layer_types: .*the same for all layers"),
        ("dots1", {"layer_types": [FULL] * 2}, "layer_types: .*num_hidden_layers = 3"),
        ("dots1", {"layer_types": ["chunked"] * 3}, "layer_types: .*'sliding_attention' or 'full_"),
        (
            "dots1",
            {"layer_types": [SLIDING] * 3, "sliding_window": None},
            "sliding_window: None; expected an integer",
        ),
    ],
)
def test_windows_that_say_nothing_clear_are_refused(family, changes, message):
    with pytest.raises(InputError, match=message):
        read_model_config(full(family, num_hidden_layers=3) | changes)
