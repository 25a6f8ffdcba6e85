"""Mixtral: GQA, softmax over the chosen experts, experts in every layer."""

from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    number,
    read_grouped_attention,
    read_rope,
    read_windows,
    require,
)
from esft_jax.families.tensors import ExpertNames, Table
from esft_jax.model.config import ModelConfig, RouterConfig

EXPERTS = ExpertNames("block_sparse_moe.experts", "w1", "w3", "w2")


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    layers, width = integer(raw, "num_hidden_layers", 32), integer(raw, "intermediate_size")
    attention = read_grouped_attention(raw, bias=(False, False), key_heads=8)
    windowed = range(0 if raw.get("sliding_window") is None else layers)
    attention, _ = read_windows(raw, attention, layers, tuple(windowed))
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
        rope=read_rope(raw, attention.head, "half", theta=1e6),
        router=RouterConfig(
            num_experts=integer(raw, "num_local_experts", 8, also="num_experts"),
            top_k=integer(raw, "num_experts_per_tok", 2),
            renormalise=True,
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-5),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 131072),
        init_std=number(raw, "initializer_range", 0.02),
    )


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config, EXPERTS)
    for layer in table.layers():
        layer.grouped_attention()
        layer.norms()
        layer.feed_forward(router="block_sparse_moe.gate")
    return table
