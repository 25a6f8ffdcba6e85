"""Attention by the gated delta rule (Gated DeltaNet, arXiv 2412.06464): a state instead of a cache
of all tokens.

Letters: B rows, S tokens of each, D model width, G key heads, H value heads; R and W features of a
key and of a value; E tokens that a convolution sees before each.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from esft_jax.model.config import DeltaAttentionConfig, NormConfig
from esft_jax.model.linear import project
from esft_jax.model.norm import RMSNorm
from esft_jax.model.params import ParamFactory, Role
from esft_jax.ops.causal_convolution import causal_convolution
from esft_jax.ops.delta_rule import gated_delta_rule
from esft_jax.sharding import RULES


class DeltaCache(NamedTuple):
    """What tokens leave for those behind them, however many they are.

    The model stacks its layers on a leading axis.

    Attributes:
        state: float32, `[B, H, R, W]`.
        tokens: the last ones, as they enter the convolution: queries, keys and values of all heads.
    """

    state: Float[Array, "*L B H R W"]
    tokens: Float[Array, "*L B E GRGRHW"]


class DeltaAttention(nnx.Module):
    """Queries and keys of G heads, values of H, each key head met by H / G of them."""

    def __init__(
        self, size: int, config: DeltaAttentionConfig, params: ParamFactory, norm: NormConfig
    ):
        self.config = config
        mixed, values, heads = config.mixed, config.heads * config.value, config.heads

        def reading(width: int) -> nnx.Param:
            return params.weight((size, width), ("embed", None), Role.ATTENTION)

        if config.by_key_head:
            self.mixed_gate, self.beta_step = reading(mixed + values), reading(2 * heads)
        else:
            self.mixed, self.gate = reading(mixed), reading(values)
            self.beta, self.step = reading(heads), reading(heads)
        self.convolution = params.weight((config.taps, mixed), ("taps", None), Role.ATTENTION)
        # exp of the one multiplies decays, so that rounding it would change all of them.
        self.log_rate = params.wide().bias(heads, Role.ATTENTION)
        self.step_offset = params.bias(heads, Role.ATTENTION)
        self.norm = RMSNorm(config.value, NormConfig(norm.eps), params.wide())  # never 1 + w
        self.out = params.weight((values, size), (None, "embed"), Role.ATTENTION)
        self.lora: nnx.Dict = nnx.Dict()  # of any of these weights, by name

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the weights that rows are multiplied with."""
        if self.config.by_key_head:
            return "mixed_gate", "beta_step", "out"
        return "mixed", "gate", "beta", "step", "out"

    @staticmethod
    def empty_cache(config: DeltaAttentionConfig, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """Nothing kept yet, for `shape`: layers, rows, and tokens, whose number does not matter."""
        *rows, _ = shape
        state = jnp.zeros((*rows, config.heads, config.key, config.value), jnp.float32)
        return DeltaCache(state, jnp.zeros((*rows, config.taps - 1, config.mixed), dtype))

    def _projections(self, x: Float[Array, "B S D"]) -> tuple[Array, Array, Array, Array]:
        """Queries, keys and values side by side; gates of the output; what gives beta, and what the
        steps of decay.
        """
        config = self.config
        if not config.by_key_head:
            mixed, gate, beta, step = (project(x, self, name) for name in self.matrices[:-1])
            return mixed, gate, beta, step
        heads, shared = config.key_heads, config.heads // config.key_heads

        def by_head(name: str, *widths: int) -> list[Array]:
            """The parts of every key head, each joined over all heads."""
            whole = project(x, self, name).reshape(*x.shape[:2], heads, -1)
            ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
            return [a.reshape(*x.shape[:2], -1) for a in jnp.split(whole, ends, axis=-1)]

        values = shared * config.value
        *parts, gate = by_head("mixed_gate", config.key, config.key, values, values)
        beta, step = by_head("beta_step", shared, shared)
        return jnp.concatenate(parts, axis=-1), gate, beta, step

    def _mix(
        self,
        x: Float[Array, "B S D"],
        segment_ids: Int[Array, "B S"],
        cache: Any,
        mesh: Mesh | None,
    ) -> tuple[Float[Array, "B S D"], DeltaCache]:
        """The layer's output, and what it leaves for later tokens."""
        config = self.config
        mixed, gate, beta, step = self._projections(x)
        step = jax.nn.softplus(step.astype(jnp.float32) + self.step_offset[...].astype(jnp.float32))
        decay = -jnp.exp(self.log_rate[...]) * step
        remember = partial(_remember, config)
        if mesh is not None:
            rows, whole = PartitionSpec(RULES.batch), PartitionSpec()
            remember = jax.shard_map(
                remember,
                mesh=mesh,
                in_specs=(rows, whole, rows, rows, rows, rows),
                out_specs=rows,
                check_vma=False,
            )
        weight = self.convolution[...]
        out, cache = remember(mixed, weight, decay, jax.nn.sigmoid(beta), segment_ids, cache)
        gate = jax.nn.silu(gate.astype(jnp.float32)).reshape(out.shape)
        out = (self.norm(out) * gate).astype(x.dtype)
        return project(out.reshape(*x.shape[:2], -1), self, "out"), cache

    def __call__(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S P"],
        sin: Float[Array, "B S P"],
        segment_ids: Int[Array, "B S"],
        mesh: Mesh | None = None,
    ) -> Float[Array, "B S D"]:
        """Over whole rows; each document begins anew. Positions are not used."""
        empty = self.empty_cache(self.config, (len(x), x.shape[1]), x.dtype)
        return self._mix(x, segment_ids, empty, mesh)[0]

    def decode(
        self,
        x: Float[Array, "B S D"],
        cos: Float[Array, "B S P"],
        sin: Float[Array, "B S P"],
        positions: Int[Array, "B S"],
        keep: Bool[Array, "B S"],
        cache: Any,
    ) -> tuple[Float[Array, "B S D"], DeltaCache]:
        """Go on from what earlier tokens left.

        Args:
            keep: False for padding, which must be behind the tokens; it leaves nothing.
        """
        return self._mix(x, keep.astype(jnp.int32), cache, None)


def _remember(
    config: DeltaAttentionConfig,
    mixed: Float[Array, "B S GRGRHW"],
    weight: Float[Array, "K GRGRHW"],
    decay: Float[Array, "B S H"],
    beta: Float[Array, "B S H"],
    segment_ids: Int[Array, "B S"],
    cache: Any,
) -> tuple[Float[Array, "B S H W"], DeltaCache]:
    """What every token reads from the state, and the cache after them."""
    mixed, tokens = causal_convolution(mixed, weight, segment_ids, cache.tokens)
    keys = config.key_heads * config.key
    query, key, value = (
        a.reshape(*a.shape[:2], heads, -1)
        for a, heads in zip(
            jnp.split(jax.nn.silu(mixed), [keys, 2 * keys], axis=-1),
            (config.key_heads, config.key_heads, config.heads),
            strict=True,
        )
    )
    out, state = gated_delta_rule(query, key, value, decay, beta, segment_ids, cache.state)
    return out, DeltaCache(state, tokens)
