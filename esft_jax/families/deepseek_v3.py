"""DeepSeek-V3 and R1, Kimi-K2, Moonlight: MLA, sigmoid routing with a selection bias."""

from esft_jax.families.keys import (
    Raw,
    dense_first,
    extra_layers,
    flag,
    integer,
    number,
    read_biased_router,
    read_latent_attention,
    require,
)
from esft_jax.families.tensors import Table
from esft_jax.model.config import ModelConfig


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    layers, width = integer(raw, "num_hidden_layers", 61), integer(raw, "moe_intermediate_size")
    attention, rope = read_latent_attention(raw, 1536)
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=dense_first(raw, layers, 3),
        dense_width=integer(raw, "intermediate_size"),
        expert_width=width,
        shared_width=integer(raw, "n_shared_experts", 1, least=0) * width,
        shared_gate=False,
        attention=attention,
        rope=rope,
        router=read_biased_router(raw, groups=(8, 4), renormalise=True, scale=2.5),
        norm_eps=number(raw, "rms_norm_eps", 1e-6),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 4096),
        carried=extra_layers(raw, layers, 1),
        init_std=number(raw, "initializer_range", 0.02),
    )


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config)
    for layer in table.layers():
        layer.latent_attention()
        layer.norms()
        layer.feed_forward(
            shared="mlp.shared_experts",
            selection_bias=("mlp.gate.e_score_correction_bias", (config.router.num_experts,)),
        )
    return table
