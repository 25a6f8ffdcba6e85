"""Grouped-query attention (GQA, arXiv 2305.13245).

Letters: B rows, S tokens of each, M slots of the cache, D model width, H query heads, G heads of
keys and values, R features of each, P pairs of those that are rotated.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from esft_jax.model.attention.core import attend
from esft_jax.model.config import GroupedAttentionConfig, NormConfig, RopeConfig
from esft_jax.model.linear import project
from esft_jax.model.norm import RMSNorm, normalise
from esft_jax.model.params import ParamFactory, Role
from esft_jax.model.rope import rotate
from esft_jax.ops.attention import masked_attention


class KeyValueCache(NamedTuple):
    """The KV cache, by heads of keys and values.

    The model stacks its layers on a leading axis.

    Attributes:
        key: rotated keys, `[B, M, G, R]`.
        value: values, `[B, M, G, R]`.
    """

    key: Float[Array, "*L B M G R"]
    value: Float[Array, "*L B M G R"]


class GroupedAttention(nnx.Module):
    """Queries of H heads; keys and values of G, each shared by H / G of them."""

    def __init__(
        self,
        size: int,
        config: GroupedAttentionConfig,
        rope: RopeConfig,
        params: ParamFactory,
        norm: NormConfig,
    ):
        self.config, self.pairing, self.eps = config, rope.pairing, norm.eps
        queries, keys = config.heads * config.head, config.key_heads * config.head
        self.q = params.weight((size, config.query_width), ("embed", None), Role.ATTENTION)
        self.k = params.weight((size, keys), ("embed", None), Role.ATTENTION)
        if not config.shared_values:
            self.v = params.weight((size, keys), ("embed", None), Role.ATTENTION)
        self.out = params.weight((queries, size), (None, "embed"), Role.ATTENTION)
        if config.input_bias:
            self.q_bias = params.bias(config.query_width, Role.ATTENTION)
            self.k_bias = params.bias(keys, Role.ATTENTION)
            if not config.shared_values:
                self.v_bias = params.bias(keys, Role.ATTENTION)
        if config.output_bias:
            self.out_bias = params.bias(size, Role.ATTENTION)
        if config.sinks:
            self.sinks = params.bias(config.heads, Role.ATTENTION)
        if config.norm != "none":
            whole = config.norm == "whole"
            self.q_norm = RMSNorm(queries if whole else config.head, norm, params)
            self.k_norm = RMSNorm(keys if whole else config.head, norm, params)
        self.lora: nnx.Dict = nnx.Dict()  # of any of these weights, by name

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the weights that rows are multiplied with."""
        return "q", "k", *(() if self.config.shared_values else ("v",)), "out"

    @staticmethod
    def empty_cache(
        config: GroupedAttentionConfig, shape: tuple[int, ...], dtype: DTypeLike
    ) -> Any:
        """Nothing kept yet, for `shape`: layers, rows, tokens."""
        zeros = jnp.zeros((*shape, config.key_heads, config.head), dtype)
        return KeyValueCache(zeros, zeros)

    def _queries(
        self, x: Float[Array, "B S D"]
    ) -> tuple[Float[Array, "B S HR"], Float[Array, "B S HR"] | None]:
        """The projection to queries, and the logits of their gates, if they have some."""
        query = project(x, self, "q")
        if not self.config.output_gate:
            return query, None
        both = query.reshape(*x.shape[:2], self.config.heads, 2, -1)
        query, gate = (both[..., part, :].reshape(*x.shape[:2], -1) for part in (0, 1))
        return query, gate

    def _heads(
        self,
        query: Float[Array, "B S HR"],
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S P"],
        sin: Float[Array, "B S P"],
    ) -> tuple[Float[Array, "B S H R"], Float[Array, "B S G R"], Float[Array, "B S G R"]]:
        """Queries, keys and values; the first two normalised and turned."""
        config, key = self.config, project(x, self, "k")
        value = key if config.shared_values else project(x, self, "v")
        if config.norm == "whole":
            query, key = self.q_norm(query), self.k_norm(key)
        if config.clip is not None:
            query, key, value = (
                jnp.clip(a, -config.clip, config.clip) for a in (query, key, value)
            )
        query, key, value = (a.reshape(*x.shape[:2], -1, config.head) for a in (query, key, value))
        if config.value_norm:
            value = normalise(value, self.eps).astype(value.dtype)
        if config.norm == "head" and config.norm_first:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = (rotate(a, cos, sin, self.pairing) for a in (query, key))
        if config.norm == "head" and not config.norm_first:
            query, key = self.q_norm(query), self.k_norm(key)
        return query, key, value

    def _sinks(self) -> Float[Array, " H"] | None:
        return self.sinks[...].astype(jnp.float32) if self.config.sinks else None

    def _output(
        self, mixed: Float[Array, "B S H R"], gate: Float[Array, "B S HR"] | None
    ) -> Float[Array, "B S D"]:
        mixed = mixed.reshape(*mixed.shape[:2], -1)
        return project(mixed if gate is None else mixed * nnx.sigmoid(gate), self, "out")

    def __call__(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S P"],
        sin: Float[Array, "B S P"],
        segment_ids: Int[Array, "B S"],
        mesh: Mesh | None = None,
    ) -> Float[Array, "B S D"]:
        """Causal attention within segments, over whole rows."""
        query, gate = self._queries(x)
        query, key, value = self._heads(query, x, cos, sin)
        window, scale = self.config.window, self.config.scale
        mixed = attend(query, key, value, segment_ids, scale, mesh, window, self._sinks())
        return self._output(mixed, gate)

    def decode(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S P"],
        sin: Float[Array, "B S P"],
        positions: Int[Array, "B S"],
        keep: Bool[Array, "B S"],
        cache: Any,
    ) -> tuple[Float[Array, "B S D"], KeyValueCache]:
        """Append tokens to the cache at `positions` and attend to the slots that they see: those
        up to their own, as far back as the window goes.

        Padding, not in `keep`, is appended, too: no token sees its slot before the next one takes
        it.
        """
        query, gate = self._queries(x)
        query, key, value = self._heads(query, x, cos, sin)
        rows = jnp.arange(x.shape[0])[:, None]
        cache = KeyValueCache(
            cache.key.at[rows, positions].set(key), cache.value.at[rows, positions].set(value)
        )
        distance = positions[:, :, None] - jnp.arange(cache.key.shape[1])
        visible = distance >= 0
        if self.config.window is not None:
            visible &= distance < self.config.window
        scale, sinks = self.config.scale, self._sinks()
        mixed = masked_attention(query, cache.key, cache.value, visible, scale, sinks)
        return self._output(mixed, gate), cache
