"""Sarvam-105B: DeepSeek-V3's layers with other defaults, and names of keys of its own."""

from esft_jax.families import deepseek_v3
from esft_jax.families.deepseek_v3 import names
from esft_jax.families.keys import Raw
from esft_jax.model.config import ModelConfig

__all__ = ["names", "read_config"]

# What the published file calls otherwise, and what stands for absent keys.
_RENAMED = {"num_experts": "n_routed_experts", "num_shared_experts": "n_shared_experts"}
_DEFAULTS = {
    "num_hidden_layers": 32,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "q_lora_rank": None,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "initializer_range": 0.006,
    "num_experts_per_tok": 8,
}


def read_config(raw: Raw) -> ModelConfig:
    """See `esft_jax.families`."""
    renamed = {_RENAMED.get(key, key): value for key, value in raw.items()}
    return deepseek_v3.read_config({**_DEFAULTS, **renamed})
