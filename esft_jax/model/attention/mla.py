"""Multi-head latent attention (MLA, arXiv 2405.04434, section 2.1).

Letters: B rows, S tokens of each, M slots of the cache, D model width, H heads, C features of a
latent, N plain and R rotated features of a key, P pairs of these, W features of a value.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from esft_jax.model.attention.core import attend
from esft_jax.model.config import LatentAttentionConfig, NormConfig, RopeConfig
from esft_jax.model.linear import project
from esft_jax.model.norm import RMSNorm
from esft_jax.model.params import ParamFactory, Role
from esft_jax.model.rope import rotate
from esft_jax.ops.attention import masked_attention

# The published code gives the norms of the low-rank latents this epsilon, whatever rms_norm_eps is.
LATENT_NORM = NormConfig(1e-6)


class LatentCache(NamedTuple):
    """The compressed KV cache: one latent and one rotated key per token, not per head.

    The model stacks its layers on a leading axis.

    Attributes:
        latent: normalised key/value latents, `[B, M, C]`.
        rotated_key: RoPE part of the keys, shared by the heads, `[B, M, R]`.
    """

    latent: Float[Array, "*L B M C"]
    rotated_key: Float[Array, "*L B M R"]


class LatentAttention(nnx.Module):
    """Queries, keys and values from low-rank latents; RoPE on a separate part of each head."""

    def __init__(
        self, size: int, config: LatentAttentionConfig, rope: RopeConfig, params: ParamFactory
    ):
        self.config, self.pairing = config, rope.pairing
        query_width, rank = config.heads * config.head, config.query_rank

        def reading(width: int) -> nnx.Param:
            return params.weight((size, width), ("embed", None), Role.ATTENTION)

        def writing(inner: int, width: int) -> nnx.Param:
            return params.weight((inner, width), (None, "embed"), Role.ATTENTION)

        if rank is None:
            self.q = reading(query_width)
        else:
            self.q_down = reading(rank)
            self.q_norm = RMSNorm(rank, LATENT_NORM, params)
            self.q_up = writing(rank, query_width)
        self.kv_down = reading(config.latent + config.rotated)
        self.kv_norm = RMSNorm(config.latent, LATENT_NORM, params)
        self.kv_up = writing(config.latent, config.heads * (config.plain + config.value))
        self.out = writing(config.heads * config.value, size)
        if config.bias:
            if rank is not None:
                self.q_down_bias = params.bias(rank, Role.ATTENTION)
            self.kv_down_bias = params.bias(config.latent + config.rotated, Role.ATTENTION)
            self.out_bias = params.bias(size, Role.ATTENTION)
        self.lora: nnx.Dict = nnx.Dict()  # of any of these weights, by name

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the weights that rows are multiplied with."""
        query = ("q",) if self.config.query_rank is None else ("q_down", "q_up")
        return (*query, "kv_down", "kv_up", "out")

    @staticmethod
    def empty_cache(config: LatentAttentionConfig, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Nothing kept yet, for `shape`: layers, rows, tokens."""
        latent = jnp.zeros((*shape, config.latent), dtype)
        return LatentCache(latent, jnp.zeros((*shape, config.rotated), dtype))

    def _queries(
        self, x: Float[Array, "B S D"], cos: Float[Array, "B S P"], sin: Float[Array, "B S P"]
    ) -> tuple[Float[Array, "B S H N"], Float[Array, "B S H R"]]:
        if self.config.query_rank is None:
            query = project(x, self, "q")
        else:
            query = project(self.q_norm(project(x, self, "q_down")), self, "q_up")
        query = query.reshape(*x.shape[:2], self.config.heads, self.config.head)
        plain, turned = jnp.split(query, [self.config.plain], axis=-1)
        return plain, rotate(turned, cos, sin, self.pairing)

    def _latents(
        self, x: Float[Array, "B S D"], cos: Float[Array, "B S P"], sin: Float[Array, "B S P"]
    ) -> LatentCache:
        both = project(x, self, "kv_down")
        latent, key = jnp.split(both, [self.config.latent], axis=-1)
        turned = rotate(key[:, :, None], cos, sin, self.pairing)[:, :, 0]
        return LatentCache(self.kv_norm(latent), turned)

    def _up_projections(self, dtype: jnp.dtype) -> tuple[Array, Array]:
        """Per-head maps from the latent to keys `[C, H, N]` and to values `[C, H, W]`."""
        weight = self.kv_up[...].astype(dtype)
        if "kv_up" in self.lora:
            weight += self.lora["kv_up"].product().astype(dtype)
        return self._by_head(weight)

    def _by_head(self, joint: Float[Array, "*B HNW"]) -> tuple[Array, Array]:
        """The parts of keys `[*B, H, N]` and values `[*B, H, W]`, which lie side by side."""
        heads = joint.reshape(*joint.shape[:-1], self.config.heads, -1)
        key, value = jnp.split(heads, [self.config.plain], axis=-1)
        return key, value

    def _keys_and_values(
        self, latent: Float[Array, "B S C"]
    ) -> tuple[Float[Array, "B S H N"], Float[Array, "B S H W"]]:
        if "kv_up" in self.lora:  # the sum of weight and update would need a gradient of its size
            return self._by_head(project(latent, self, "kv_up"))
        key_up, value_up = self._up_projections(latent.dtype)
        key = jnp.einsum("bsc,chn->bshn", latent, key_up)
        return key, jnp.einsum("bsc,chw->bshw", latent, value_up)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S P"],
        sin: Float[Array, "B S P"],
        segment_ids: Int[Array, "B S"],
        mesh: Mesh | None = None,
    ) -> Float[Array, "B S D"]:
        """Causal attention within segments, over whole rows."""
        plain, turned = self._queries(x, cos, sin)
        kv = self._latents(x, cos, sin)
        key, value = self._keys_and_values(kv.latent)
        shared = jnp.broadcast_to(kv.rotated_key[:, :, None], turned.shape)
        mixed = attend(
            jnp.concatenate([plain, turned], axis=-1),
            jnp.concatenate([key, shared], axis=-1),
            value,
            segment_ids,
            self.config.scale,
            mesh,
        )
        return project(mixed.reshape(*x.shape[:2], -1), self, "out")

    def decode(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S P"],
        sin: Float[Array, "B S P"],
        positions: Int[Array, "B S"],
        keep: Bool[Array, "B S"],
        cache: Any,
    ) -> tuple[Float[Array, "B S D"], LatentCache]:
        """Append tokens to the cache at `positions` and attend to all slots up to their own.

        Padding, not in `keep`, is appended, too: no token sees its slot before the next one takes
        it. The up-projections are absorbed into the queries and the outputs, so that attention runs
        over the latents and keys and values are never expanded.
        """
        plain, turned = self._queries(x, cos, sin)
        new = self._latents(x, cos, sin)
        rows = jnp.arange(x.shape[0])[:, None]
        cache = LatentCache(
            cache.latent.at[rows, positions].set(new.latent),
            cache.rotated_key.at[rows, positions].set(new.rotated_key),
        )
        key_up, value_up = self._up_projections(x.dtype)
        query = jnp.concatenate([jnp.einsum("bshn,chn->bshc", plain, key_up), turned], axis=-1)
        key = jnp.concatenate([cache.latent, cache.rotated_key], axis=-1)
        visible = jnp.arange(key.shape[1]) <= positions[:, :, None]
        # All heads share the latents: as queries of one head they meet them without a copy each.
        mixed = masked_attention(
            query.reshape(len(x), -1, 1, query.shape[-1]),
            key[:, :, None],
            cache.latent[:, :, None],
            jnp.repeat(visible, self.config.heads, axis=1),
            self.config.scale,
        )
        mixed = jnp.einsum("bshc,chw->bshw", mixed.reshape(*query.shape[:3], -1), value_up)
        return project(mixed.reshape(*x.shape[:2], -1), self, "out"), cache
