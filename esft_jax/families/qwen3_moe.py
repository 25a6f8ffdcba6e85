"""Qwen3-MoE: GQA with a norm of each head, softmax routing, no shared experts."""

from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    number,
    read_grouped_attention,
    read_rope,
    refuse_windows,
    require,
    sparse_layers,
)
from esft_jax.families.tensors import Table
from esft_jax.model.config import ModelConfig, RouterConfig


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    require(raw, "use_sliding_window", False, None)
    refuse_windows(raw)
    layers, bias = integer(raw, "num_hidden_layers", 24), flag(raw, "attention_bias", False)
    attention = read_grouped_attention(raw, bias=(bias, bias), key_heads=4, norm="head")
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=sparse_layers(raw, layers),
        dense_width=integer(raw, "intermediate_size"),
        expert_width=integer(raw, "moe_intermediate_size", 768),
        shared_width=0,
        shared_gate=False,
        attention=attention,
        rope=read_rope(raw, attention.head, "half"),
        router=RouterConfig(
            num_experts=integer(raw, "num_experts", 128, also="num_local_experts"),
            top_k=integer(raw, "num_experts_per_tok", 8),
            renormalise=flag(raw, "norm_topk_prob", False),
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 32768),
        init_std=number(raw, "initializer_range", 0.02),
    )


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config)
    for layer in table.layers():
        layer.grouped_attention()
        layer.norms()
        layer.feed_forward()
    return table
