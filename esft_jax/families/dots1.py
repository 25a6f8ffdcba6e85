"""dots.llm1: GQA with a norm of each head, DeepSeek-V3's routing."""

from esft_jax.families.glm4_moe import names
from esft_jax.families.keys import (
    Raw,
    dense_first,
    flag,
    integer,
    number,
    read_biased_router,
    read_grouped_attention,
    read_rope,
    read_windows,
    require,
    windowed_layers,
)
from esft_jax.model.config import ModelConfig

__all__ = ["names", "read_config"]


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    layers, width = integer(raw, "num_hidden_layers", 62), integer(raw, "moe_intermediate_size")
    below = integer(raw, "max_window_layers", 62, least=0)
    if raw.get("sliding_window", 4096) is None:
        below = layers
    bias = flag(raw, "attention_bias", False)
    attention = read_grouped_attention(raw, bias=(bias, bias), key_heads=32, norm="head")
    windowed = windowed_layers(raw, layers, range(below, layers))
    attention, second = read_windows(raw, attention, layers, windowed)
    shared = 0
    if raw.get("n_shared_experts") is not None:
        shared = integer(raw, "n_shared_experts", least=0)
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=dense_first(raw, layers, 0),
        dense_width=integer(raw, "intermediate_size"),
        expert_width=width,
        shared_width=shared * width,
        shared_gate=False,
        attention=attention,
        second=second,
        rope=read_rope(raw, attention.head, "half"),
        router=read_biased_router(raw, renormalise=False),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 2048),
        init_std=number(raw, "initializer_range", 0.02),
    )
