"""MiniMax-M2: GQA with a norm of all heads together, sigmoid routing with a selection bias."""

from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    number,
    read_grouped_attention,
    read_rope,
    require,
)
from esft_jax.families.mixtral import EXPERTS
from esft_jax.families.tensors import Table
from esft_jax.model.config import ModelConfig, RouterConfig


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    require(raw, "scoring_func", "sigmoid")
    require(raw, "use_qk_norm", True)
    require(raw, "qk_norm_type", "per_layer")
    require(raw, "shared_intermediate_size", 0)
    layers, width = integer(raw, "num_hidden_layers", 62), integer(raw, "intermediate_size")
    attention = read_grouped_attention(
        raw, bias=(False, False), key_heads=8, norm="whole", head=128
    )
    share = 1.0
    if raw.get("rotary_dim") is not None:  # the published file says features, not their share
        share = integer(raw, "rotary_dim") / attention.head
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
        rope=read_rope(raw, attention.head, "half", theta=5000000.0, rotated_share=share),
        router=RouterConfig(
            num_experts=integer(raw, "num_local_experts", 256, also="num_experts"),
            top_k=integer(raw, "num_experts_per_tok", 8),
            score="sigmoid",
            selection_bias=True,
            renormalise=True,
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 196608),
        init_std=number(raw, "initializer_range", 0.02),
    )


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config, EXPERTS)
    bias = "block_sparse_moe.e_score_correction_bias", (config.router.num_experts,)
    for layer in table.layers():
        layer.grouped_attention()
        layer.norms()
        layer.feed_forward(router="block_sparse_moe.gate", selection_bias=bias)
    return table
