"""Qwen3.5 and Qwen3.6 MoE: as Qwen3-Next; alone, or the language model beside one of vision."""

from dataclasses import replace

from esft_jax.errors import InputError
from esft_jax.families import qwen3_next
from esft_jax.families.keys import Raw, flag, integer, require, text_part
from esft_jax.families.qwen3_next import read_decoder
from esft_jax.families.tensors import ExpertNames, Table
from esft_jax.model.config import ModelConfig, RouterConfig


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    if raw.get("model_type") != "qwen3_5_moe":
        return _read_text(raw)
    config = _read_text(text_part(raw))
    if flag(raw, "tie_word_embeddings", False) != config.tie_embeddings:
        raise InputError(
            "tie_word_embeddings: says something else than in text_config; expected both alike"
        )
    carried = (*config.carried, "model.visual.")
    return replace(config, prefix="model.language_model.", carried=carried)


def _read_text(raw: Raw) -> ModelConfig:
    require(raw, "mlp_only_layers", [], None)
    require(raw, "norm_topk_prob", True, None)
    layers = integer(raw, "num_hidden_layers", 40)
    router = RouterConfig(
        num_experts=integer(raw, "num_experts", 256, also="num_local_experts"),
        top_k=integer(raw, "num_experts_per_tok", 8),
        renormalise=True,
    )
    # Text has the same position in all sections of M-RoPE, which is then plain RoPE.
    plain = {
        key: {k: v for k, v in value.items() if not k.startswith("mrope_")}
        if key in ("rope_parameters", "rope_scaling") and isinstance(value, dict)
        else value
        for key, value in raw.items()
    }
    return read_decoder(plain, layers, tuple(range(layers)), 0, router, by_key_head=False)


def names(config: ModelConfig) -> Table:
    """See `esft_jax.families`."""
    return qwen3_next.names(config, ExpertNames(known_to_peft=False))
