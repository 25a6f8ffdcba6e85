"""The Flax NNX model: DeepSeek-V2 style Mixture-of-Experts transformers."""

from esft_jax.model.config import ModelConfig, RopeConfig, RouterConfig
from esft_jax.model.transformer import ModelOutput, Transformer

__all__ = ["ModelConfig", "ModelOutput", "RopeConfig", "RouterConfig", "Transformer"]
