"""Measuring how relevant each expert is to a task (arXiv 2407.01906, equations 6 and 7).

Letters: L MoE layers, B samples, S tokens of each, K experts per token, E experts.
"""

from collections.abc import Collection, Iterable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float64, Int, Integer

from esft_jax.data.batch import Batch
from esft_jax.errors import InputError
from esft_jax.model.router import RouterOutput
from esft_jax.model.transformer import Transformer
from esft_jax.ops.cross_entropy import cross_entropy_sums
from esft_jax.routing.log import RoutingLog
from esft_jax.routing.scores import ExpertScores
from esft_jax.selection_config import FurtherMethod
from esft_jax.sharding import RULES, place_batch

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


def gate_effects(
    model: Transformer, batch: dict[str, Array], *, output_norms: bool = False
) -> tuple[Float[Array, "L B S K"], RouterOutput]:
    """Each gate times the derivative of the loss by it, and the router outputs.

    To first order, the loss changes by minus that if the token does without the expert (Taylor
    criterion of Molchanov et al., arXiv 1906.10771). The loss is the sum over learned tokens, in
    nats; rows do not depend on each other. No parameter is differentiated: one backward pass gives
    the derivatives by all gates, and no gradient of a weight.
    """
    inputs = batch["tokens"], batch["segment_ids"], batch["positions"]

    def loss(probe: Array) -> tuple[Array, RouterOutput]:
        hidden, router = model.hidden_states(*inputs, gate_probe=probe, output_norms=output_norms)
        targets, weights = batch["targets"], batch["loss_weights"]
        total, _ = cross_entropy_sums(
            hidden, model.head_weight(), targets, weights, model.mesh, model.config.logit_cap
        )
        return total, router

    config = model.config
    shape = len(config.moe_layers), *batch["tokens"].shape, config.router.top_k
    probe = jnp.zeros(shape, jnp.float32)
    if model.mesh is not None and model.mesh.size > 1:
        rows = NamedSharding(model.mesh, PartitionSpec(None, RULES.batch))
        probe = jax.lax.with_sharding_constraint(probe, rows)
    return jax.grad(loss, has_aux=True)(probe)


def contrast(
    task: Float[np.ndarray, "L E"], general: Float[np.ndarray, "L E"]
) -> Float64[np.ndarray, "L E"]:
    """How much more the task uses each expert than a general sample does, from token scores.

    The general ones count as halfway between what was measured and even routing: of an expert that
    neither sample meets, a plain quotient would be noise, and the largest of all.
    """
    return _shares("contrast", task / (general + 1 / general.shape[1]))


def _shares(method: FurtherMethod, values: Float[np.ndarray, "L E"]) -> Float64[np.ndarray, "L E"]:
    """Divided by the sum over each layer."""
    total = values.astype(np.float64).sum(axis=1, keepdims=True)
    if not (total > 0).all():  # also of NaN
        raise InputError(
            f"score: {method}: 0 for all experts of a layer, or no number; expected finite "
            "activations, and learned tokens for gate_taylor"
        )
    return values / total


class _Sums(NamedTuple):
    """Over rows, each averaged over its own tokens; and counts. None is not asked for."""

    token: Float[Any, "L E"]
    gate: Float[Any, "L E"] | None
    gate_share: Float[Any, "L E"]
    contribution: Float[Any, "L E"] | None
    gate_taylor: Float[Any, "L E"] | None
    samples: Int[Any, ""]
    tokens: Int[Any, ""]
    together: Int[Any, "L E E"]


def _batch_sums(
    model: Transformer, batch: dict[str, Array], further: Collection[FurtherMethod]
) -> tuple[_Sums, RouterOutput]:
    config, norms = model.config.router, "contribution" in further
    effects = None
    if "gate_taylor" in further:
        # Activations of all layers would take more memory than training, which may rematerialise.
        model.remat = "full"
        effects, router = gate_effects(model, batch, output_norms=norms)
    else:
        inputs = batch["tokens"], batch["segment_ids"], batch["positions"]
        _, router = model.hidden_states(*inputs, output_norms=norms)

    def summed(values: Float[Array, "L B S K"]) -> tuple[Array, Array]:
        return sample_scores(router.expert_ids, values, config.num_experts)

    token, gate_share = summed(gate_shares(router.gates))
    real = batch["segment_ids"] > 0
    sums = _Sums(
        token=token,
        # Of a router that renormalises, gates are shares already.
        gate=None if config.renormalise else summed(router.gates / config.scale)[1],
        gate_share=gate_share,
        contribution=None if router.output_norms is None else summed(router.output_norms)[1],
        gate_taylor=None if effects is None else summed(jnp.abs(effects))[1],
        samples=real.any(axis=1).sum(),
        tokens=real.sum(),
        together=chosen_together(router.expert_ids, config.num_experts),
    )
    return sums, router


def score_experts(
    model: Transformer,
    batches: Iterable[Batch],
    provenance: dict[str, Any] | None = None,
    *,
    further: Collection[FurtherMethod] = (),
    general: Iterable[Batch] = (),
    seed: int = 0,
) -> ExpertScores:
    """Run a model over task samples and average its routing.

    Gate shares are measured of every router, mean gates of those that do not renormalise. Other
    scores are measured where they are asked for, in the same pass: `contribution` computes a
    token's experts one by one, and `gate_taylor` adds a backward pass. `contrast` adds a pass over
    the general sample.

    The routing itself is kept beside the averages, of the first documents that together have at
    most `ROUTING_TOKENS` tokens.

    Args:
        model: the base model.
        batches: one row is one sample; only tokens, segment ids and positions are read, for
            `gate_taylor` targets and loss weights, too. With a mesh: this process's rows of the
            global batch.
        provenance: where the samples came from; kept with the scores.
        further: scores to measure besides those of the routing.
        general: batches of a general sample, for `contrast`.
        seed: of `random`.

    Raises:
        ValueError: no sample holds a token.
        InputError: a score that was asked for is 0 for all experts of a layer, or no number.
    """
    graph, params = nnx.split(model)

    def sums_of(
        params: nnx.State, batch: dict[str, Array], further: frozenset[FurtherMethod]
    ) -> tuple[_Sums, RouterOutput]:
        return _batch_sums(nnx.merge(graph, params), batch, further)

    @partial(jax.jit, static_argnames=("further", "keep"))
    def add(
        totals: _Sums,
        params: nnx.State,
        batch: dict[str, Array],
        further: frozenset[FurtherMethod],
        keep: bool,
    ) -> tuple[_Sums, _Batch | None]:
        sums, router = sums_of(params, batch, further)
        routing = _Batch(
            router.expert_ids.astype(jnp.uint16),
            (router.gates / model.config.router.scale).astype(jnp.float16),
            batch["segment_ids"],
            batch["tokens"],
        )
        found = jax.tree.map(jnp.add, totals, sums), routing if keep else None
        if model.mesh is not None:  # every process reads all of it
            everywhere = NamedSharding(model.mesh, PartitionSpec())
            found = jax.lax.with_sharding_constraint(found, everywhere)
        return found

    def run(
        batches: Iterable[Batch], further: frozenset[FurtherMethod], room: int
    ) -> tuple[_Sums, list[_Batch]]:
        """Totals, and the routing of the first `room` tokens or some more."""
        totals, kept = None, []
        for batch in batches:
            inputs = {key: value for key, value in batch.items() if key in _read(further)}
            placed = place_batch(inputs, model.mesh)
            if totals is None:
                shapes, _ = jax.eval_shape(partial(sums_of, further=further), params, placed)
                totals = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            totals, routing = add(totals, params, placed, further, keep=room > 0)
            if routing is not None:
                kept.append(_Batch(*map(np.asarray, routing)))
                room -= int((kept[-1].segment_ids > 0).sum())
        sums = None if totals is None else jax.device_get(totals)
        if sums is None or sums.samples == 0:
            raise ValueError("no sample to score; expected at least one batch with tokens")
        return sums, kept

    sums, kept = run(batches, frozenset(further) & {"contribution", "gate_taylor"}, ROUTING_TOKENS)
    found = {**(provenance or {}), "samples": int(sums.samples), "tokens": int(sums.tokens)}
    others: dict[str, Float64[np.ndarray, "L E"]] = {}
    for method in ("contribution", "gate_taylor"):
        if method in further:
            others[method] = _shares(method, getattr(sums, method))
    if "contrast" in further:
        whole, _ = run(general, frozenset(), 0)
        found |= {"general_samples": int(whole.samples), "general_tokens": int(whole.tokens)}
        others["contrast"] = contrast(sums.token / sums.samples, whole.token / whole.samples)
    if "random" in further:
        draws = np.random.default_rng(seed).exponential(size=sums.token.shape)
        others["random"] = _shares("random", draws)

    def mean(total: Float[np.ndarray, "L E"]) -> Float64[np.ndarray, "L E"]:
        return total.astype(np.float64) / sums.samples

    return ExpertScores(
        layers=model.config.moe_layers,
        token=mean(sums.token),
        gate=None if sums.gate is None else mean(sums.gate),
        provenance=found,
        together=sums.together.astype(np.int64),
        routing=_routing_log(kept, model.config.moe_layers, model.config.router.num_experts),
        gate_share=mean(sums.gate_share),
        **others,
    )


def _read(further: Collection[FurtherMethod]) -> tuple[str, ...]:
    """What is read of a batch."""
    learned = ("targets", "loss_weights") if "gate_taylor" in further else ()
    return "tokens", "segment_ids", "positions", *learned


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
