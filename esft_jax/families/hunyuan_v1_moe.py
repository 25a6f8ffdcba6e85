"""Hunyuan-A13B: GQA with a norm of each head after RoPE, softmax routing, one shared expert."""

from dataclasses import replace

from esft_jax.errors import InputError
from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    number,
    read_grouped_attention,
    read_rope,
    require,
)
from esft_jax.families.tensors import Table
from esft_jax.model.config import ModelConfig, RopeConfig, RouterConfig


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    require(raw, "use_qk_norm", True)
    require(raw, "use_cla", False)
    layers, width = integer(raw, "num_hidden_layers", 32), integer(raw, "intermediate_size")
    bias = flag(raw, "attention_bias", False)
    attention = read_grouped_attention(raw, bias=(bias, bias), norm="head", norm_first=False)
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        dense_width=width,
        expert_width=_same(raw, "moe_intermediate_size", width, layers),
        shared_width=width * _same(raw, "num_shared_expert", 1, layers),
        shared_gate=False,
        attention=attention,
        rope=_read_rope(raw, attention.head),
        router=RouterConfig(
            num_experts=integer(raw, "num_experts", also="num_local_experts"),
            top_k=_same(raw, "moe_topk", 1, layers),
            renormalise=True,
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-5),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 2048),
        init_std=number(raw, "initializer_range", 0.02),
    )


def _same(raw: Raw, key: str, default: int, layers: int) -> int:
    """A number, or a list of the same number for each layer."""
    value = raw.get(key)
    if value is None and key == "moe_topk":  # as transformers 5 writes it
        value = raw.get("num_experts_per_tok")
    value = default if value is None else value
    if isinstance(value, list) and len(value) == layers and len({*map(repr, value)}) == 1:
        value = value[0]
    if type(value) is not int or value < 1:
        raise InputError(f"{key}: {value!r}; expected one integer from 1 for all layers")
    return value


def _read_rope(raw: Raw, head: int) -> RopeConfig:
    """The files call it dynamic, but a fixed `alpha` only stretches the base."""
    name = "rope_parameters" if raw.get("rope_parameters") else "rope_scaling"
    scaling = raw.get(name) or {}
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else None
    if kind != "dynamic" or not scaling.get("alpha"):
        return read_rope(raw, head, "half")
    alpha = number(scaling, "alpha")
    kinds = {"rope_type": "default", "type": "default", "alpha": None}
    plain = read_rope({**raw, name: {**scaling, **kinds}}, head, "half")
    return replace(plain, theta=plain.theta * alpha ** (head / (head - 2)))


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config)
    for layer in table.layers():
        layer.grouped_attention(("self_attn.query_layernorm", "self_attn.key_layernorm"))
        layer.norms()
        layer.feed_forward(router="mlp.gate.wg", shared="mlp.shared_mlp")
    return table
