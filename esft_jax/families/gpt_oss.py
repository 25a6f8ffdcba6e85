"""gpt-oss: GQA with sinks and biases, windows in every second layer, a clamped SwiGLU."""

from dataclasses import replace

from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    number,
    read_grouped_attention,
    read_rope,
    read_windows,
    require,
    windowed_layers,
)
from esft_jax.families.tensors import ExpertNames, Table
from esft_jax.model.config import ModelConfig, RouterConfig
from esft_jax.ops.activation import Activation

_EXPERTS = ExpertNames(transposed=True, interleaved=True, stored_fused=True, known_to_peft=False)
# Where neither spelling says anything.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    layers, width = integer(raw, "num_hidden_layers", 36), integer(raw, "intermediate_size")
    bias = flag(raw, "attention_bias", True)
    head = None if "head_dim" in raw else 64
    attention = replace(
        read_grouped_attention(raw, bias=(bias, bias), key_heads=8, head=head), sinks=True
    )
    windowed = windowed_layers(raw, layers, range(0, layers, 2))
    attention, second = read_windows(raw, attention, layers, windowed, window=128)
    if not (raw.get("rope_parameters") or raw.get("rope_scaling")):
        raw = {**raw, "rope_parameters": _ROPE}
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=tuple(range(layers)),
        dense_width=width,
        expert_width=width,
        shared_width=0,
        shared_gate=False,
        attention=attention,
        second=second,
        rope=read_rope(raw, attention.head, "half", theta=150000.0),
        router=RouterConfig(
            num_experts=integer(raw, "num_local_experts", 128, also="num_experts"),
            top_k=integer(raw, "num_experts_per_tok", 4),
            logit_bias=True,
            renormalise=True,
        ),
        expert_bias=True,
        activation=Activation(
            alpha=number(raw, "swiglu_alpha", 1.702),
            limit=number(raw, "swiglu_limit", 7.0),
            offset=1.0,
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-5),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 131072),
        init_std=number(raw, "initializer_range", 0.02),
    )


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config, _EXPERTS)
    for layer in table.layers():
        layer.grouped_attention()
        layer.norms()
        layer.feed_forward(router="mlp.router")
    return table
