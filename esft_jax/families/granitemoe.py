"""Granite 3 MoE: GQA, softmax over the chosen experts, fused experts, four multipliers."""

from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    number,
    read_grouped_attention,
    read_rope,
    require,
)
from esft_jax.families.tensors import ExpertNames, Table
from esft_jax.model.config import ModelConfig, Multipliers, RouterConfig

_EXPERTS = ExpertNames(
    prefix="block_sparse_moe.experts",
    fused=("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
    stored_fused=True,
    known_to_peft=False,
)


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    layers, width = integer(raw, "num_hidden_layers", 32), integer(raw, "intermediate_size")
    bias = flag(raw, "attention_bias", False)
    scale = number(raw, "attention_multiplier", 1.0)
    attention = read_grouped_attention(raw, bias=(bias, bias), scale=scale)
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
            num_experts=integer(raw, "num_local_experts", 8),
            top_k=integer(raw, "num_experts_per_tok", 2),
            renormalise=True,
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 2048),
        multipliers=Multipliers(
            embedding=number(raw, "embedding_multiplier", 1.0),
            residual=number(raw, "residual_multiplier", 1.0),
            logits=1 / number(raw, "logits_scaling", 1.0),
        ),
        init_std=number(raw, "initializer_range", 0.02),
    )


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config, _EXPERTS)
    for layer in table.layers():
        layer.grouped_attention()
        layer.norms()
        layer.feed_forward(router="block_sparse_moe.router.layer")
    return table
