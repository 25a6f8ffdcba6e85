"""Gemma 4 with experts, its text part: windows in most layers, and a shared expert in all."""

from dataclasses import replace

from esft_jax.errors import InputError
from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    layers_of,
    number,
    read_grouped_attention,
    read_rope,
    require,
    text_part,
)
from esft_jax.families.tensors import ExpertNames, Table
from esft_jax.model.config import (
    GroupedAttentionConfig,
    ModelConfig,
    Multipliers,
    RopeConfig,
    RouterConfig,
    SecondAttention,
)
from esft_jax.model.params import Role
from esft_jax.ops.activation import Activation

_FUSED = "experts.gate_up_proj", "experts.down_proj"
_EXPERTS = ExpertNames("experts", fused=_FUSED, stored_fused=True, known_to_peft=False)
_PARTS = "vision_tower", "embed_vision", "audio_tower", "embed_audio"
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"
_ROPE = {
    _LOCAL: {"rope_type": "default", "rope_theta": 10000.0},
    _GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
}


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`; of the whole model, or of its text part alone."""
    if raw["model_type"] == "gemma4_text":
        return _read_text(raw)
    text = text_part(raw)
    require(raw, "tie_word_embeddings", flag(text, "tie_word_embeddings", True))
    carried = tuple(f"model.{part}." for part in _PARTS)
    return replace(_read_text(text), prefix="model.language_model.", carried=carried)


def _read_text(raw: Raw) -> ModelConfig:
    require(raw, "hidden_activation", "gelu_pytorch_tanh")
    if not flag(raw, "enable_moe_block", False):
        raise InputError(f"enable_moe_block: {raw.get('enable_moe_block')}; expected true")
    integer(raw, "hidden_size_per_layer_input", least=0)
    require(raw, "hidden_size_per_layer_input", 0)
    require(raw, "num_kv_shared_layers", 0)
    require(raw, "use_bidirectional_attention", None, "vision")  # only images are seen so
    size, layers = integer(raw, "hidden_size"), integer(raw, "num_hidden_layers", 30)
    dense, cap = integer(raw, "intermediate_size", 9216), raw.get("final_logit_softcapping")
    kinds = raw.get("layer_types") or [_GLOBAL if n % 6 == 5 else _LOCAL for n in range(layers)]
    # The last layer has no window, whatever it says.
    whole = tuple(sorted({*layers_of(kinds, layers, _GLOBAL, _LOCAL), layers - 1}))
    attention, rope = _attention(raw, _GLOBAL, _global_shape(raw, whole))
    second = None
    if len(whole) < layers:
        second = SecondAttention(whole, attention, rope)
        attention, rope = _attention(raw, _LOCAL, {})
        attention = replace(attention, window=integer(raw, "sliding_window", 512))
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=size,
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        dense_width=dense,
        expert_width=integer(raw, "moe_intermediate_size"),
        shared_width=dense,
        shared_gate=False,
        attention=attention,
        rope=rope,
        second=second,
        router=RouterConfig(
            num_experts=integer(raw, "num_experts"),
            top_k=integer(raw, "top_k_experts"),
            renormalise=True,
            input_norm=True,
            expert_scale=True,
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings", True),
        max_positions=integer(raw, "max_position_embeddings", 131072),
        activation=Activation("gelu_tanh"),
        multipliers=Multipliers(embedding=size**0.5),
        init_std=number(raw, "initializer_range", 0.02),
        output_norms=True,
        expert_norms=True,
        layer_scale=True,
        logit_cap=None if cap is None else number(raw, "final_logit_softcapping"),
    )


def _global_shape(raw: Raw, whole: tuple[int, ...]) -> Raw:
    """What layers without a window have of their own, by name, or layer by layer."""
    heads, given = raw.get("num_global_key_value_heads"), raw.get("per_layer_config")
    if given is None:
        shape = {"head_dim": integer(raw, "global_head_dim", 512)}
        shared = heads is not None and flag(raw, "attention_k_eq_v", False)
        return shape | ({"num_key_value_heads": heads} if shared else {})
    # Numbers of layers are filled up with zeros to one length.
    numbered = isinstance(given, dict) and all(str(key).isdecimal() for key in given)
    shapes = {int(key): shape for key, shape in given.items()} if numbered else {}
    first = shapes.get(whole[0])
    alike = isinstance(first, dict) and shapes == dict.fromkeys(whole, first)
    if first is None or not alike or first.keys() - {"head_dim", "num_key_value_heads"}:
        raise InputError(
            f"per_layer_config: {given!r}; expected the same head_dim and num_key_value_heads for "
            f"{list(whole)}, without windows"
        )
    require(raw, "global_head_dim", first.get("head_dim"))
    return first


def _attention(raw: Raw, kind: str, shape: Raw) -> tuple[GroupedAttentionConfig, RopeConfig]:
    """Of the layers of a kind."""
    ropes = raw.get("rope_parameters") or _ROPE
    if not isinstance(ropes, dict) or not isinstance(ropes.get(kind), dict):
        raise InputError(f"rope_parameters: {ropes!r}; expected an object for {kind!r}")
    bias, shared = flag(raw, "attention_bias", False), flag(raw, "attention_k_eq_v", False)
    keys = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, **raw, **shape}
    attention = read_grouped_attention(keys, bias=(bias, bias), norm="head", scale=1.0)
    attention = replace(attention, value_norm=True, shared_values=shared and kind == _GLOBAL)
    given = {"rope_parameters": ropes[kind]}
    return attention, read_rope(given, attention.head, "half", proportional=True)


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table, size = Table(config, _EXPERTS), config.hidden_size
    for layer in table.layers():
        layer.grouped_attention()
        layer.norms("input_layernorm", "pre_feedforward_layernorm")
        layer.norm("post_attention_layernorm", ("attention_output_norm",), size)
        layer.norm("post_feedforward_layernorm", ("ffn_output_norm",), size)
        layer.norm("post_feedforward_layernorm_1", ("moe", "shared_norm"), size)
        layer.norm("pre_feedforward_layernorm_2", ("moe", "input_norm"), size)
        layer.norm("post_feedforward_layernorm_2", ("moe", "output_norm"), size)
        layer.feed_forward(router="router.proj", shared="mlp")
        layer.vector("router.scale", ("moe", "router", "input_scale"), size, Role.ROUTER)
        scale, experts = ("moe", "router", "expert_scale"), config.router.num_experts
        layer.vector("router.per_expert_scale", scale, experts, Role.ROUTER)
        layer.vector("layer_scalar", ("scale",), 1, Role.LAYER_SCALE)
    return table
