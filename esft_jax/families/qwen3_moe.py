"""Qwen3-MoE: GQA with a norm of each head, softmax routing, no shared experts."""

from esft_jax.errors import InputError
from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    number,
    read_grouped_attention,
    read_rope,
    read_windows,
    require,
    sparse_layers,
    windowed_layers,
)
from esft_jax.families.tensors import Table
from esft_jax.model.config import ModelConfig, RouterConfig


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    layers, bias = integer(raw, "num_hidden_layers", 24), flag(raw, "attention_bias", False)
    attention = read_grouped_attention(raw, bias=(bias, bias), key_heads=4, norm="head")
    windows = flag(raw, "use_sliding_window", False) and raw.get("sliding_window", 4096) is not None
    windowed = tuple(range(layers if windows else 0))
    if windowed_layers(raw, layers, windowed) != windowed:
        raise InputError(
            f"layer_types: {raw['layer_types']!r}; expected the same for all layers, as "
            "use_sliding_window and sliding_window say"
        )
    attention, _ = read_windows(raw, attention, layers, windowed)
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
