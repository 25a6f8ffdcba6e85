"""OLMoE: attention with a norm of all heads together, softmax routing, experts in every layer."""

from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    number,
    read_grouped_attention,
    read_rope,
    require,
)
from esft_jax.families.qwen3_moe import names
from esft_jax.model.config import ModelConfig, RouterConfig

__all__ = ["names", "read_config"]


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    layers, bias = integer(raw, "num_hidden_layers", 16), flag(raw, "attention_bias", False)
    width = integer(raw, "intermediate_size")
    clip = None if raw.get("clip_qkv") is None else number(raw, "clip_qkv")
    attention = read_grouped_attention(raw, bias=(bias, bias), norm="whole", clip=clip)
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
        rope=read_rope(raw, attention.head, "half"),
        router=RouterConfig(
            num_experts=integer(raw, "num_experts", 64, also="num_local_experts"),
            top_k=integer(raw, "num_experts_per_tok", 8),
            renormalise=flag(raw, "norm_topk_prob", False),
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-5),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 4096),
        init_std=number(raw, "initializer_range", 0.02),
    )
