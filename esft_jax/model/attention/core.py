"""What all kinds of attention share: the mixing of values over a mesh."""

import jax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from esft_jax.ops.attention import causal_attention
from esft_jax.sharding import RULES


def attend(
    query: Float[Array, "B S H R"],
    key: Float[Array, "B S G R"],
    value: Float[Array, "B S G W"],
    segment_ids: Int[Array, "B S"],
    scale: float,
    mesh: Mesh | None,
    window: int | None = None,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B S H W"]:
    """Causal attention within segments; every device mixes its own rows."""

    def mix(query: Array, key: Array, value: Array, segments: Array, sinks: Array | None) -> Array:
        return causal_attention(query, key, value, segments, scale, window=window, sinks=sinks)

    if mesh is not None:
        batch = PartitionSpec(RULES.batch)
        specs = (batch, batch, batch, batch, PartitionSpec())
        mix = jax.shard_map(mix, mesh=mesh, in_specs=specs, out_specs=batch, check_vma=False)
    return mix(query, key, value, segment_ids, sinks)
