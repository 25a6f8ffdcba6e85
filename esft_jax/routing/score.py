"""Measuring how relevant each expert is to a task (arXiv 2407.01906, equations 6 and 7).

Letters: L MoE layers, B samples, S tokens of each, K experts per token, E experts.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Integer

from esft_jax.data.batch import Batch
from esft_jax.model.transformer import Transformer
from esft_jax.routing.log import RoutingLog
from esft_jax.routing.scores import ExpertScores
from esft_jax.sharding import place_batch

# Tokens whose routing is kept beside the scores: as many as the paper scores, 61 MB before
# compression for DeepSeek-V2-Lite.
ROUTING_TOKENS = 2**17


def sample_scores(
    expert_ids: Int[Array, "L B S K"], gates: Float[Array, "L B S K"], num_experts: int
) -> tuple[Float[Array, "L E"], Float[Array, "L E"]]:
    """Token and gate scores summed over the B samples, each averaged over its own tokens.

    A sample without tokens (all padding) adds nothing.
    """
    top_k = expert_ids.shape[-1]

    def one(ids: Array, gates: Array) -> tuple[Array, Array]:
        ids, gates = ids.reshape(-1), gates.reshape(-1)
        empty = jnp.zeros(num_experts, jnp.float32)
        counts = empty.at[ids].add(1.0, mode="drop")
        tokens = jnp.maximum(counts.sum() / top_k, 1.0)
        return counts / (top_k * tokens), empty.at[ids].add(gates, mode="drop") / tokens

    token, gate = jax.vmap(jax.vmap(one))(expert_ids, gates)
    return token.sum(axis=1), gate.sum(axis=1)


def gate_shares(gates: Float[Array, "*B K"]) -> Float[Array, "*B K"]:
    """Gates divided by their sum over a token's K experts; 0 where all are 0."""
    total = gates.sum(axis=-1, keepdims=True)
    return jnp.where(total > 0, gates / jnp.where(total > 0, total, 1.0), 0.0)


def chosen_together(expert_ids: Int[Array, "L B S K"], num_experts: int) -> Int[Array, "L E E"]:
    """How many tokens chose both of two experts; on the diagonal, how many chose one."""

    def layer(ids: Array) -> Array:
        # Phantom ids are no expert and give zeros. Sums of ones are exact in float32 up to 2^24.
        chosen = jax.nn.one_hot(ids, num_experts, dtype=jnp.float32).sum(axis=2)
        return jnp.einsum("bse,bsf->ef", chosen, chosen).astype(jnp.int32)

    return jax.lax.map(layer, expert_ids)


def score_experts(
    model: Transformer,
    batches: Iterable[Batch],
    provenance: dict[str, Any] | None = None,
) -> ExpertScores:
    """Run a model forward over task samples and average its routing.

    Gate shares are measured of every router, mean gates of those that do not renormalise.

    The routing itself is kept beside the averages, of the first documents that together have at
    most `ROUTING_TOKENS` tokens.

    Args:
        model: the base model.
        batches: one row is one sample; only tokens, segment ids and positions are read. With a
            mesh: this process's rows of the global batch.
        provenance: where the samples came from; kept with the scores.

    Raises:
        ValueError: no sample holds a token.
    """
    graph, params = nnx.split(model)
    num_experts = model.config.router.num_experts

    @partial(jax.jit, static_argnames="keep")
    def add(
        totals: tuple, params: nnx.State, batch: dict[str, Array], keep: bool
    ) -> tuple[tuple, _Batch | None]:
        model = nnx.merge(graph, params)
        _, router = model.hidden_states(batch["tokens"], batch["segment_ids"], batch["positions"])
        token, share = sample_scores(router.expert_ids, gate_shares(router.gates), num_experts)
        gates = router.gates / model.config.router.scale
        # Of a router that renormalises, gates are shares already.
        gate = None
        if not model.config.router.renormalise:
            _, gate = sample_scores(router.expert_ids, gates, num_experts)
        filled = (batch["segment_ids"] > 0).any(axis=1).sum()
        tokens = (batch["segment_ids"] > 0).sum()
        together = chosen_together(router.expert_ids, num_experts)
        totals = jax.tree.map(jnp.add, totals, (token, gate, share, filled, tokens, together))
        if not keep:
            return totals, None
        routing = _Batch(
            router.expert_ids.astype(jnp.uint16),
            gates.astype(jnp.float16),
            batch["segment_ids"],
            batch["tokens"],
        )
        if model.mesh is not None:  # every process reads all rows
            everywhere = NamedSharding(model.mesh, PartitionSpec())
            routing = jax.lax.with_sharding_constraint(routing, everywhere)
        return totals, routing

    zeros = jnp.zeros((len(model.config.moe_layers), num_experts), jnp.float32)
    none = jnp.zeros((), jnp.int32)
    pairs = jnp.zeros((*zeros.shape, num_experts), jnp.int32)
    raw = None if model.config.router.renormalise else zeros
    totals: Any = (zeros, raw, zeros, none, none, pairs)
    kept: list[_Batch] = []
    room = ROUTING_TOKENS
    for batch in batches:
        inputs = {
            "tokens": batch["tokens"],
            "segment_ids": batch["segment_ids"],
            "positions": batch["positions"],
        }
        totals, routing = add(totals, params, place_batch(inputs, model.mesh), keep=room > 0)
        if routing is not None:
            kept.append(_Batch(*map(np.asarray, routing)))
            room -= int((kept[-1].segment_ids > 0).sum())
    token, gate, share, samples, tokens, together = jax.device_get(totals)
    if samples == 0:
        raise ValueError("no sample to score; expected at least one batch with tokens")
    return ExpertScores(
        layers=model.config.moe_layers,
        token=token.astype(np.float64) / samples,
        gate=None if gate is None else gate.astype(np.float64) / samples,
        provenance={**(provenance or {}), "samples": int(samples), "tokens": int(tokens)},
        together=together.astype(np.int64),
        routing=_routing_log(kept, model.config.moe_layers, num_experts),
        gate_share=share.astype(np.float64) / samples,
    )


class _Batch(NamedTuple):
    """What is kept of one batch."""

    expert_ids: Integer[Any, "L B S K"]
    gates: Float[Any, "L B S K"]
    segment_ids: Int[Any, "B S"]
    tokens: Int[Any, "B S"]


def _routing_log(kept: list[_Batch], layers: tuple[int, ...], num_experts: int) -> RoutingLog:
    """Of whole documents: at least one, and `ROUTING_TOKENS` tokens at most."""
    real = [batch.segment_ids > 0 for batch in kept]
    # A document starts where its number changes and where a row begins.
    first = [
        np.diff(batch.segment_ids, axis=1, prepend=-1)[filled] != 0
        for batch, filled in zip(kept, real, strict=True)
    ]
    total = sum(int(filled.sum()) for filled in real)
    starts = np.append(np.flatnonzero(np.concatenate(first)), total)
    fitting = np.searchsorted(starts, ROUTING_TOKENS, side="right")
    starts = starts[: max(fitting, 2)]

    def tokens_of(arrays: list[np.ndarray], axis: int) -> np.ndarray:
        joined = np.concatenate(arrays, axis)
        return joined.take(range(starts[-1]), axis)

    return RoutingLog(
        layers=layers,
        num_experts=num_experts,
        expert_ids=tokens_of([b.expert_ids[:, f] for b, f in zip(kept, real, strict=True)], 1),
        gates=tokens_of([b.gates[:, f] for b, f in zip(kept, real, strict=True)], 1),
        starts=starts,
        tokens=tokens_of([b.tokens[f] for b, f in zip(kept, real, strict=True)], 0),
    )
