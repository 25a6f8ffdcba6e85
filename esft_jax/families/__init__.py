"""The model families: a file each; no other module knows a model's name.

A family is a module with two functions: `read_config(raw)` makes a `ModelConfig` of a parsed
`config.json`, and `names(config)` says where each tensor of its checkpoints lies.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from esft_jax.errors import InputError
from esft_jax.families import (
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    gemma4,
    glm4_moe,
    glm4_moe_lite,
    gpt_oss,
    granitemoe,
    hunyuan_v1_moe,
    minimax_m2,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_5_moe,
    qwen3_moe,
    qwen3_next,
    sarvam_mla,
)
from esft_jax.families.quantization import read_quantization
from esft_jax.families.tensors import Table
from esft_jax.files import read_json
from esft_jax.model.config import ModelConfig


class Family(Protocol):
    """What the module of a family offers."""

    def read_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """The shape of a model of the family.

        Raises:
            InputError: a missing key, or a value that is not supported; naming the key.
        """

    def names(self, config: ModelConfig) -> Table:
        """Where each tensor of a checkpoint lies."""


# By the `model_type` of `config.json`.
FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "dots1": dots1,
    "ernie4_5_moe": ernie4_5_moe,
    "gemma4": gemma4,
    "gemma4_text": gemma4,
    "glm4_moe": glm4_moe,
    "glm4_moe_lite": glm4_moe_lite,
    "gpt_oss": gpt_oss,
    "granitemoe": granitemoe,
    "hunyuan_v1_moe": hunyuan_v1_moe,
    "kimi_k2": deepseek_v3,
    "minimax_m2": minimax_m2,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_5_moe": qwen3_5_moe,
    "qwen3_5_moe_text": qwen3_5_moe,
    "qwen3_moe": qwen3_moe,
    "qwen3_next": qwen3_next,
    "sarvam_mla": sarvam_mla,
}


def load_model_config(folder: str | Path) -> ModelConfig:
    """Read `config.json` of a Hugging Face folder.

    Raises:
        InputError: naming the file, and the key.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; expected a Hugging Face model folder")
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object")
    try:
        return read_model_config(raw)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_model_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The shape of a model, from its parsed `config.json`.

    Raises:
        InputError: an unknown family or key, or a value that is not supported.
    """
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise InputError(f"model_type: {name!r} is not supported; expected one of {known}")
    config = replace(FAMILIES[name].read_config(raw), family=name, **read_quantization(raw))
    router, experts = config.router, config.router.num_experts
    if experts % router.num_groups:
        raise InputError(f"n_group: {router.num_groups} does not divide {experts} experts")
    reachable = router.top_groups * (experts // router.num_groups)
    if router.top_groups > router.num_groups or router.top_k > reachable:
        raise InputError(
            f"num_experts_per_tok: {router.top_k} of {reachable} reachable experts "
            f"(topk_group = {router.top_groups} of n_group = {router.num_groups})"
        )
    return config


@lru_cache(maxsize=16)
def tensor_table(config: ModelConfig) -> Table:
    """Where each tensor of a model's checkpoint lies; not to be changed."""
    return FAMILIES[config.family].names(config)
