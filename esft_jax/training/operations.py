"""Floating-point operations of a training step by arithmetic, nothing computed twice."""

from collections.abc import Mapping

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.adapt.partition import trained_roles
from esft_jax.families import tensor_table
from esft_jax.model.config import (
    AttentionConfig,
    DeltaAttentionConfig,
    GroupedAttentionConfig,
    ModelConfig,
)
from esft_jax.model.params import Role


def model_operations(
    config: ModelConfig,
    trained: Trained,
    length: int,
    served: Mapping[int, float] | None = None,
) -> float:
    """Operations per trained token by arithmetic, nothing computed twice.

    Every layer runs forward; from the lowest trained one up, the gradients of the activations take
    as much again, and so do the gradients of weights that are trained. Of attention, the scores
    that queries see count: half of all, or those in their windows; the gradients of these take
    twice as much.

    Args:
        length: tokens per row.
        served: by layer, the share of assignments that the trained experts serve; their share of
            the layer's experts where it is not known.
    """
    if isinstance(trained, LoRA):
        # Weights are frozen, and gradients of activations reach down to the lowest update.
        first = trained.lowest_layer(config)
        assert first is not None
        frozen = _operations(config, ExpertConfig({}), first, length)
        return frozen + _low_rank_operations(config, trained)
    return _operations(config, trained, _lowest_trained(config, trained), length, served)


def _low_rank_operations(config: ModelConfig, lora: LoRA) -> float:
    """Of the factors, per token: forward, gradients of what they meet, gradients of their own."""
    sides = 0.0
    for place in tensor_table(config).places.values():
        if not place.is_matrix:
            continue
        if place.role is Role.ROUTED_EXPERT:
            row, expert = place.index
            if expert in lora.experts.experts.get(config.moe_layers[row], ()):
                sides += sum(place.shape) * config.router.top_k / config.router.num_experts
        elif place.role in lora.roles:
            sides += sum(place.shape)
    return 2 * 3 * lora.rank * sides


def _operations(
    config: ModelConfig,
    experts: ExpertConfig | None,
    first: int,
    length: int,
    served: Mapping[int, float] | None = None,
) -> float:
    """Of the model itself; gradients reach down to layer `first`."""
    roles = trained_roles(experts, config)
    learns = {role: float(role in roles) for role in Role}
    # A tied head is the embedding.
    head = learns[Role.EMBEDDING if config.tie_embeddings else Role.HEAD]
    size = config.hidden_size
    kinds = [_of_attention(kind, size, length) for kind, _ in config.attentions]
    expert, router = 3 * size * config.expert_width, size * config.router.num_experts
    total = size * config.vocab_size * (1 + (first < config.num_layers) + head)
    for layer in range(config.num_layers):
        passes = 1 + (layer >= first)
        attention, scores = kinds[config.kind(layer)]
        total += attention * (passes + learns[Role.ATTENTION])
        total += scores * (3 if layer >= first else 1)
        if layer not in config.moe_layers:
            total += 3 * size * config.dense_width * (passes + learns[Role.DENSE_MLP])
            continue
        trained = 1.0
        if served is not None:
            trained = served[layer]
        elif experts is not None:
            trained = len(experts.experts.get(layer, ())) / config.router.num_experts
        total += config.router.top_k * expert * (passes + trained)
        total += router * (passes + learns[Role.ROUTER])
        total += 3 * size * config.shared_width * (passes + learns[Role.SHARED_EXPERT])
    return 2 * total


def _of_attention(kind: AttentionConfig, size: int, length: int) -> tuple[float, float]:
    """Weights of the projections, and per token products of scores and values, or with a state."""
    if isinstance(kind, DeltaAttentionConfig):
        # The state meets the key twice, to be read and to be corrected, and the query.
        values, products = kind.heads * kind.value, 3 * kind.heads * kind.key * kind.value
        inputs = kind.mixed + values + 2 * kind.heads
        return size * (inputs + values) + kind.taps * kind.mixed, products
    window = kind.window if isinstance(kind, GroupedAttentionConfig) else None
    window = min(window or length, length)
    seen = window - window**2 / (2 * length)  # a row's first tokens see less than a window
    scores = kind.heads * (kind.head + kind.value) * seen
    if isinstance(kind, GroupedAttentionConfig):
        keys = kind.key_heads * kind.head * (1 if kind.shared_values else 2)
        return size * (kind.query_width + keys + kind.heads * kind.head), scores
    query = kind.heads * kind.head
    attention = size * query if kind.query_rank is None else kind.query_rank * (size + query)
    attention += size * (kind.latent + kind.rotated)
    attention += kind.heads * kind.latent * (kind.plain + kind.value)
    return attention + kind.heads * kind.value * size, scores


def _lowest_trained(config: ModelConfig, experts: ExpertConfig | None) -> int:
    """The lowest decoder layer that the backward pass reaches; their number for none of them."""
    roles = trained_roles(experts, config)
    moe = config.moe_layers
    dense = [layer for layer in range(config.num_layers) if layer not in moe]
    layers = {
        Role.EMBEDDING: [0],
        Role.NORM: [0],
        Role.ATTENTION: [0],
        Role.DENSE_MLP: dense,
        Role.ROUTER: moe,
        Role.SHARED_EXPERT: moe,
        Role.ROUTED_EXPERT: moe
        if experts is None
        else [layer for layer, ids in experts.experts.items() if ids],
    }
    reached = (layer for role, its in layers.items() if role in roles for layer in its)
    return min(reached, default=config.num_layers)
