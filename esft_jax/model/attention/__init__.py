"""The kinds of attention; which one a model has is said by its configuration."""

from typing import Any

from jax.typing import DTypeLike

from esft_jax.model.attention.delta import DeltaAttention, DeltaCache
from esft_jax.model.attention.gqa import GroupedAttention, KeyValueCache
from esft_jax.model.attention.mla import LatentAttention, LatentCache
from esft_jax.model.config import DeltaAttentionConfig, LatentAttentionConfig, ModelConfig
from esft_jax.model.params import ParamFactory

Attention = DeltaAttention | GroupedAttention | LatentAttention
Cache = DeltaCache | KeyValueCache | LatentCache
# One of each kind of attention. Not said of `Cache`: the sizes of one would be asked of the others.
Caches = tuple[Any, ...]


def make_attention(config: ModelConfig, kind: int, params: ParamFactory) -> Attention:
    """The attention of one kind, an index of `ModelConfig.attentions`."""
    size, (attention, rope) = config.hidden_size, config.attentions[kind]
    if isinstance(attention, LatentAttentionConfig):
        return LatentAttention(size, attention, rope, params)
    if isinstance(attention, DeltaAttentionConfig):
        return DeltaAttention(size, attention, params, config.norm)
    return GroupedAttention(size, attention, rope, params, config.norm)


def empty_cache(config: ModelConfig, kind: int, rows: int, length: int, dtype: DTypeLike) -> Cache:
    """A cache of one kind for `length` tokens of each row, layers stacked."""
    layers = sum(config.kind(layer) == kind for layer in range(config.num_layers))
    shape, (attention, _) = (layers, rows, length), config.attentions[kind]
    if isinstance(attention, LatentAttentionConfig):
        return LatentAttention.empty_cache(attention, shape, dtype)
    if isinstance(attention, DeltaAttentionConfig):
        return DeltaAttention.empty_cache(attention, shape, dtype)
    return GroupedAttention.empty_cache(attention, shape, dtype)
