"""GLM-4.7-Flash: DeepSeek-V3's layers with other defaults."""

from esft_jax.errors import InputError
from esft_jax.families.deepseek_v3 import names
from esft_jax.families.keys import (
    Raw,
    extra_layers,
    flag,
    integer,
    number,
    read_biased_router,
    read_latent_attention,
    require,
)
from esft_jax.model.config import ModelConfig

__all__ = ["names", "read_config"]


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    require(raw, "hidden_act", "silu")
    layers, width = integer(raw, "num_hidden_layers", 47), integer(raw, "moe_intermediate_size")
    attention, rope = read_latent_attention(raw, 768)
    return ModelConfig(
        vocab_size=integer(raw, "vocab_size"),
        hidden_size=integer(raw, "hidden_size"),
        num_layers=layers,
        moe_layers=_moe_layers(raw, layers),
        dense_width=integer(raw, "intermediate_size"),
        expert_width=width,
        shared_width=integer(raw, "n_shared_experts", 1, least=0) * width,
        shared_gate=False,
        attention=attention,
        rope=rope,
        router=read_biased_router(raw, scale=1.8),
        norm_eps=number(raw, "rms_norm_eps", 1e-5),
        tie_embeddings=flag(raw, "tie_word_embeddings", False),
        max_positions=integer(raw, "max_position_embeddings", 202752),
        carried=extra_layers(raw, layers, 1),
        init_std=number(raw, "initializer_range", 0.02),
    )


def _moe_layers(raw: Raw, layers: int) -> tuple[int, ...]:
    """By the kinds of layers, or as in the published file: all but the lowest few."""
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        first = integer(raw, "first_k_dense_replace", 1, least=0)
        kinds = ["dense"] * first + ["sparse"] * (layers - first)
    if not isinstance(kinds, list) or len(kinds) != layers or {*kinds} - {"dense", "sparse"}:
        raise InputError(f"mlp_layer_types: expected {layers} times 'dense' or 'sparse'")
    if "sparse" not in kinds:
        raise InputError("mlp_layer_types: no layer is 'sparse'; expected one with experts")
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sparse")
