"""The Flax NNX model: Mixture-of-Experts decoders, by switches."""

from esft_jax.model.config import ModelConfig, RopeConfig, RouterConfig
from esft_jax.model.transformer import ModelOutput, Transformer

__all__ = ["ModelConfig", "ModelOutput", "RopeConfig", "RouterConfig", "Transformer"]
