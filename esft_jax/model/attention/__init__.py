"""The kinds of attention; which one a model has is said by its configuration."""

from jax.typing import DTypeLike

from esft_jax.model.attention.gqa import GroupedAttention, KeyValueCache
from esft_jax.model.attention.mla import LatentAttention, LatentCache
from esft_jax.model.config import LatentAttentionConfig, ModelConfig
from esft_jax.model.params import ParamFactory

Attention = GroupedAttention | LatentAttention
Cache = KeyValueCache | LatentCache


def make_attention(config: ModelConfig, params: ParamFactory) -> Attention:
    """The attention of one kind of layers."""
    size, attention = config.hidden_size, config.attention
    if isinstance(attention, LatentAttentionConfig):
        return LatentAttention(size, attention, config.rope, params)
    return GroupedAttention(size, attention, config.rope, params, config.norm_eps)


def empty_cache(config: ModelConfig, rows: int, length: int, dtype: DTypeLike) -> Cache:
    """A cache for `length` tokens of each row, layers stacked."""
    shape, attention = (config.num_layers, rows, length), config.attention
    if isinstance(attention, LatentAttentionConfig):
        return LatentAttention.empty_cache(attention, shape, dtype)
    return GroupedAttention.empty_cache(attention, shape, dtype)
