"""ERNIE 4.5 MoE: GQA, softmax routing with a selection bias, shared experts, a tied head."""

from esft_jax.errors import InputError
from esft_jax.families.keys import (
    Raw,
    flag,
    integer,
    number,
    read_grouped_attention,
    read_rope,
    require,
)
from esft_jax.families.tensors import Table
from esft_jax.model.config import ModelConfig, RouterConfig


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    require(raw, "use_bias", False, None)
    layers = integer(raw, "num_hidden_layers", 28)
    width = integer(raw, "moe_intermediate_size", 1536)
    attention = read_grouped_attention(raw, bias=(False, False), key_heads=4)
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=_moe_layers(raw, layers),
        dense_width=integer(raw, "intermediate_size"),
        expert_width=width,
        shared_width=integer(raw, "moe_num_shared_experts", 2, least=0) * width,
        shared_gate=False,
        attention=attention,
        rope=read_rope(raw, attention.head, "interleaved", theta=500000.0),
        router=RouterConfig(
            num_experts=integer(raw, "moe_num_experts", 64, also="num_experts"),
            top_k=integer(raw, "moe_k", 6, also="num_experts_per_tok"),
            selection_bias=True,
            renormalise=True,
            least_sum=number(raw, "moe_norm_min", 1e-12),
        ),
        norm_eps=number(raw, "rms_norm_eps", 1e-5),
        tie_embeddings=flag(raw, "tie_word_embeddings", True),
        max_positions=integer(raw, "max_position_embeddings", 131072),
        carried=("model.mtp_",),
        init_std=number(raw, "initializer_range", 0.02),
    )


def _moe_layers(raw: Raw, layers: int) -> tuple[int, ...]:
    start, step = (
        integer(raw, "moe_layer_start_index", 1, least=0),
        integer(raw, "moe_layer_interval", 1),
    )
    end = integer(raw, "moe_layer_end_index", -1, least=-1)
    last = layers - 1 if end == -1 else end
    found = tuple(n for n in range(layers) if (n + 1) % step == 0 and start <= n <= last)
    if not found:
        raise InputError(
            f"moe_layer_start_index: no MoE layer from {start} to {last}, each {step}th"
        )
    return found


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    table = Table(config)
    bias = "mlp.moe_statics.e_score_correction_bias", (1, config.router.num_experts)
    for layer in table.layers():
        layer.grouped_attention()
        layer.norms()
        layer.feed_forward(shared="mlp.shared_experts", selection_bias=bias)
    return table
