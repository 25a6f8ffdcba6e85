"""Qwen2-MoE: GQA with biases, softmax routing, a shared expert behind a sigmoid."""

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
from esft_jax.families.tensors import ExpertNames, Table
from esft_jax.model.config import ModelConfig, RouterConfig


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    layers = integer(raw, "num_hidden_layers", 24)
    attention = read_grouped_attention(raw, bias=(flag(raw, "qkv_bias", True), False), key_heads=16)
    windows = flag(raw, "use_sliding_window", False)
    below = integer(raw, "max_window_layers", 28, least=0)
    windowed = windowed_layers(raw, layers, range(0, min(below, layers) if windows else 0, 2))
    if windowed and not windows:
        raise InputError("layer_types: 'sliding_attention'; expected use_sliding_window = true")
    attention, second = read_windows(raw, attention, layers, windowed)
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=sparse_layers(raw, layers),
        dense_width=integer(raw, "intermediate_size"),
        expert_width=integer(raw, "moe_intermediate_size", 1408),
        shared_width=integer(raw, "shared_expert_intermediate_size", 5632),
        shared_gate=True,
        attention=attention,
        second=second,
        rope=read_rope(raw, attention.head, "half"),
        router=RouterConfig(
            num_experts=integer(raw, "num_experts", 60, also="num_local_experts"),
            top_k=integer(raw, "num_experts_per_tok", 4),
            renormalise=flag(raw, "norm_topk_prob", False),
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 32768),
        init_std=number(raw, "initializer_range", 0.02),
    )


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config, ExpertNames(known_to_peft=False))
    for layer in table.layers():
        layer.grouped_attention()
        layer.norms()
        layer.feed_forward(shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate")
    return table
