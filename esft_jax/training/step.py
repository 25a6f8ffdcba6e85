"""One optimizer update, and one evaluation, as compiled functions."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from esft_jax.adapt.partition import FROZEN, TUNED
from esft_jax.adapt.tuned import TunedExperts, in_bank
from esft_jax.data.batch import Batch
from esft_jax.errors import InputError
from esft_jax.model.params import Role
from esft_jax.model.remat import Remat
from esft_jax.model.router import RouterOutput
from esft_jax.model.transformer import Transformer
from esft_jax.moe.carry import count_copies
from esft_jax.ops.cross_entropy import cross_entropy_sums
from esft_jax.training.rounding import Rounding, widened
from esft_jax.training.state import TrainState, TunedOnly, tuned_only

TrainStep = Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Array]]]
# `loss(model, batch) -> (sum, weight)`: two float32 scalars. The loss is their quotient, of which
# only the sum is differentiated. Of several micro-batches, sums and weights are added up first, and
# so they are of the batches of a validation set.
Loss = Callable[[Transformer, Batch], tuple[Float[Array, ""], Float[Array, ""]]]


def token_loss(model: Transformer, batch: Batch) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The default loss: over all tokens, the sum of weight times loss in nats, and of weights."""
    return loss_sums(model, batch)[0], jnp.sum(batch["loss_weights"])


def loss_sums(
    model: Transformer, batch: Batch, earlier: Any = None
) -> tuple[Float[Array, ""], Float[Array, " B"], RouterOutput]:
    """The sum over tokens of weight times loss in nats; that of each row, which cannot be
    differentiated; and the router outputs.

    Args:
        earlier: see `Transformer.hidden_states`.
    """
    hidden, router = model.hidden_states(
        batch["tokens"], batch["segment_ids"], batch["positions"], earlier
    )
    total, rows = cross_entropy_sums(
        hidden,
        model.head_weight(),
        batch["targets"],
        batch["loss_weights"],
        model.mesh,
        model.config.logit_cap,
    )
    return total, rows, router


def sums_by_source(
    rows: Float[Array, " B"], batch: Batch, sources: int
) -> tuple[Float[Array, " N"], Float[Array, " N"]]:
    """Loss sums of rows, and weights of their tokens, added up by source."""
    weights = batch["loss_weights"].sum(axis=1)
    of = jax.nn.one_hot(batch["sources"], sources)
    # Not a product: a matrix unit would round the sums.
    return (of * rows[:, None]).sum(axis=0), (of * weights[:, None]).sum(axis=0)


def count_assignments(router: RouterOutput) -> Int[Array, "L E"]:
    """How many tokens each expert of each MoE layer was chosen by."""
    layers, num_experts = router.expert_ids.shape[0], router.scores.shape[-1]
    ids = router.expert_ids.reshape(layers, -1, 1)
    # Not a scatter: compilers make one loop of the comparison and the sum, on every platform.
    return (ids == jnp.arange(num_experts)).sum(axis=1, dtype=jnp.int32)


def expert_load(
    assignments: Int[Array, "L E"], tuned: Bool[np.ndarray, "L E"] | None
) -> dict[str, Float[Array, ""]]:
    """How evenly tokens are spread over experts, by metric name; means over the layers.

    Assignments of the busiest and of the idlest expert over the mean of a layer; the entropy of
    their shares over that of equal ones; and the share of all assignments that meet `tuned` ones.
    """
    counts = assignments.astype(jnp.float32)
    total = counts.sum(axis=1, keepdims=True)
    load = counts * counts.shape[1] / total
    entropy = -jax.scipy.special.xlogy(counts / total, counts / total).sum(axis=1)
    load_metrics = {
        "experts/max_over_mean": load.max(axis=1).mean(),
        "experts/min_over_mean": load.min(axis=1).mean(),
        "experts/entropy": entropy.mean() / np.log(counts.shape[1]),
    }
    if tuned is not None:
        load_metrics["experts/tuned_share"] = jnp.where(tuned, counts, 0.0).sum() / counts.sum()
    return load_metrics


def balance_loss(router: RouterOutput, assignments: Int[Array, "L E"]) -> Float[Array, ""]:
    """Load-balancing loss, summed over MoE layers; 1 per layer when the load is uniform.

    `sum_e f_e P_e` with f the share of assignments times E and P the mean share of the scores over
    the batch's tokens (arXiv 2405.04434, equations 23 to 25; 2412.19437, 17 to 20).

    Args:
        assignments: what `count_assignments` finds in the same router outputs.
    """
    num_experts, top_k = router.scores.shape[-1], router.expert_ids.shape[-1]

    def layer(counts: Array, scores: Array) -> Array:
        # Softmax scores have the sum 1 already; those of tokens that are masked out are all 0.
        probs = scores / jnp.maximum(scores.sum(axis=-1, keepdims=True), 1e-20)
        tokens = jnp.maximum(counts.sum() / top_k, 1.0)
        share = counts * num_experts / (top_k * tokens)
        return jnp.sum(share * probs.reshape(-1, num_experts).sum(axis=0) / tokens)

    return jax.vmap(layer)(assignments.astype(jnp.float32), router.scores).sum()


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss = token_loss,
    micro_batches: int = 1,
    remat: Remat = "none",
    balance_weight: float = 0.0,
    sources: Sequence[str] = (),
    seed: int = 0,
) -> TrainStep:
    """A pure function `(state, frozen, batch) -> (state, metrics)`; see `jit_train_step`.

    The loss is the mean over the whole batch, however it falls on micro-batches. Where it or a
    gradient is not finite, parameters and optimizer stay as they are. Gradients are taken with
    respect to the tuned partition alone.

    Metrics are scalars: `loss`; `grad_norm`, before any clipping; `target_tokens`, the sum
    of loss weights (`loss_weight` of an own loss); `skipped`, the updates so far that were not
    made; with a `balance_weight`, `balance_loss`; of each source, `loss/NAME` and
    `target_tokens/NAME`; and of the default loss, those of `expert_load`.

    Args:
        graph: of the model, from `partition`.
        optimizer: what `init_state` was given; any optax transformation. It is applied to the
            tuned partition only (`tuned_only`).
        loss: what is minimised, see `Loss`.
        micro_batches: parts of a batch that are computed one after the other; they divide its rows
            on each device.
        remat: what is rematerialised in the backward pass.
        balance_weight: of `balance_loss`, which is added.
        sources: names of the sources of mixed batches, for their losses and tokens in the metrics.
        seed: of the stochastic rounding of masters and moments that are kept in bfloat16.

    Raises:
        InputError: `balance_weight` or `sources` beside an own loss, whose routers and rows are not
            known here; or, when it is traced, the loss is not two scalars.
    """
    own_loss, optimizer = loss is not token_loss, tuned_only(optimizer)
    if own_loss and (balance_weight or sources):
        raise InputError(
            f"loss: {'balance_weight' if balance_weight else 'sources'} is for the default loss "
            "only; expected an own loss without it"
        )

    def objective(
        tuned: nnx.State, frozen: nnx.State, batch: Batch, total_weight: Array, earlier: Any = None
    ) -> tuple[Array, tuple[Array, Array, tuple | None, Array | None]]:
        model = nnx.merge(graph, tuned, frozen)
        model.remat, model.experts_learn = remat, _base_experts_learn(tuned)
        if own_loss:
            total, weight = _two_scalars(loss(model, batch))
            return total, (total, weight, None, None)
        nll, rows, router = loss_sums(model, batch, earlier)
        mean = nll / total_weight
        by_source = sums_by_source(rows, batch, len(sources)) if sources else None
        assignments = count_assignments(router)
        if not balance_weight:
            return mean, (mean, jnp.zeros(()), by_source, assignments)
        balance = balance_loss(router, assignments) / micro_batches
        return mean + balance_weight * balance, (mean, balance, by_source, assignments)

    def step(
        state: TrainState, frozen: nnx.State, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        total_weight = _not_zero(batch["loss_weights"].sum())
        # Below, `other` is the balance loss, or the weight of an own loss.
        gradient = jax.grad(objective, has_aux=True)

        def accumulate(totals: tuple, micro: Batch) -> tuple[tuple, None]:
            before, others = totals
            # Banks are most of what is trained: a gradient beside the sum of those before it would
            # take as much memory again. Not of factors, which are small, and scaled where they are
            # read; nor of bfloat16 masters, whose gradients are in less than the sum. An own loss
            # may go through the model more than once.
            model = nnx.merge(graph, before, frozen)
            in_place = (
                isinstance(model.tuned_experts, TunedExperts)
                and all(x.dtype == jnp.float32 for x in jax.tree.leaves(state.tuned))
                and not own_loss
                and count_copies(model.mesh) == 1
            )
            earlier = model.tuned_experts.banks if in_place else None
            grads, found = gradient(state.tuned, frozen, micro, total_weight, earlier)

            def add(total: nnx.Variable, grad: nnx.Variable) -> nnx.Variable:
                return grad if in_place and in_bank(total) else jax.tree.map(jnp.add, total, grad)

            grads = jax.tree.map(add, before, grads, is_leaf=lambda x: isinstance(x, nnx.Variable))
            return (grads, jax.tree.map(jnp.add, others, found)), None

        if micro_batches == 1:
            grads, found = gradient(state.tuned, frozen, batch, total_weight)
        else:
            none_yet = (jnp.zeros(len(sources)),) * 2 if sources else None
            unassigned = None if own_loss else _no_assignments(graph, state.tuned, frozen)
            zeros = (
                jax.tree.map(partial(jnp.zeros_like, dtype=jnp.float32), state.tuned),
                (jnp.zeros(()), jnp.zeros(()), none_yet, unassigned),
            )
            (grads, found), _ = jax.lax.scan(accumulate, zeros, _split(batch, micro_batches))
        mean, other, by_source, assignments = found
        if own_loss:  # whose weight is known now
            scale = 1 / _not_zero(other)
            mean, grads = mean * scale, jax.tree.map(lambda grad: grad * scale, grads)
        norm = optax.tree.norm(widened(grads))
        finite = jnp.isfinite(mean) & jnp.isfinite(norm)
        skipped = state.skipped + ~finite
        metrics = {"loss": mean, "grad_norm": norm, "skipped": skipped}
        if own_loss:
            metrics["loss_weight"] = other
        else:
            metrics["target_tokens"] = total_weight
        if balance_weight:
            metrics["balance_loss"] = other
        if by_source is not None:
            for name, nll, weight in zip(sources, *by_source, strict=True):
                metrics[f"loss/{name}"] = nll / weight  # not a number without tokens: not logged
                metrics[f"target_tokens/{name}"] = weight
        if assignments is not None:
            metrics |= expert_load(assignments, _selected(graph, state.tuned, frozen))

        rounding = Rounding.of(seed, state.step, _held_rows(graph, state.tuned, frozen))

        update = partial(apply_gradients, optimizer, grads, frozen, rounding)

        def update_if_finite(*before: Any) -> tuple:
            # Not a choice between numbers: that would need the old ones beside the new ones.
            return jax.lax.cond(finite, update, lambda *same: same, *before)

        def update_in_loop(*before: Any) -> tuple:
            # On GPUs, XLA has a condition write beside what it may leave alone, all states once
            # more. A loop of one turn or none is in place, but keeps every gradient to its end.
            turns = finite.astype(jnp.int32)
            return jax.lax.fori_loop(0, turns, lambda _, now: update(*now), before)

        tuned, opt_state = jax.lax.platform_dependent(
            state.tuned, state.opt_state, cuda=update_in_loop, default=update_if_finite
        )
        return TrainState(state.step + 1, skipped, tuned, opt_state), metrics

    return step


def apply_gradients(
    optimizer: TunedOnly,
    grads: nnx.State,
    frozen: nnx.State,
    rounding: Rounding,
    tuned: nnx.State,
    opt_state: optax.OptState,
) -> tuple[nnx.State, optax.OptState]:
    """The tuned parameters and the optimizer's state after an update, in the types they had."""
    before = tuned, opt_state
    tuned, opt_state = widened(before)
    # `multi_transform` wants a tree for the frozen partition; these zeros are never computed since
    # their updates are not read.
    updates, opt_state = optimizer.update(
        {TUNED: widened(grads), FROZEN: jax.tree.map(jnp.zeros_like, frozen)},
        opt_state,
        {TUNED: tuned, FROZEN: frozen},
    )
    tuned = optax.apply_updates(tuned, updates[TUNED])
    return rounding.narrowed((tuned, opt_state), before)


def jit_train_step(step: TrainStep, shardings: Any) -> jax.stages.Wrapped:
    """Jit a train step: the state is updated in place, and stays where `shardings` say."""
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(
    graph: nnx.GraphDef, loss: Loss = token_loss
) -> Callable[[nnx.State, nnx.State, Batch], tuple[Array, Array]]:
    """A pure function `(tuned, frozen, batch) -> (sum, weight)` of a loss."""

    def step(tuned: nnx.State, frozen: nnx.State, batch: Batch) -> tuple[Array, Array]:
        return _two_scalars(loss(nnx.merge(graph, tuned, frozen), batch))

    return step


def _base_experts_learn(tuned: nnx.State) -> bool:
    return any(
        param.role is Role.ROUTED_EXPERT and not in_bank(param)
        for _, param in nnx.to_flat_state(tuned)
    )


def _held_rows(
    graph: nnx.GraphDef, tuned: nnx.State, frozen: nnx.State
) -> Int[np.ndarray, " R"] | None:
    """What the rows of the banks beside the base experts hold; None without banks."""
    bank = nnx.merge(graph, tuned, frozen).tuned_experts
    return None if bank is None else bank.layout.held


def _selected(
    graph: nnx.GraphDef, tuned: nnx.State, frozen: nnx.State
) -> Bool[np.ndarray, "L E"] | None:
    """Which experts have banks beside the base experts; None without banks."""
    bank = nnx.merge(graph, tuned, frozen).tuned_experts
    if bank is None:
        return None
    ids = np.arange(bank.layout.num_experts)
    return np.array([np.isin(ids, selected) for selected in bank.layout.selected])


def _no_assignments(graph: nnx.GraphDef, tuned: nnx.State, frozen: nnx.State) -> Int[Array, "L E"]:
    config = nnx.merge(graph, tuned, frozen).config
    return jnp.zeros((len(config.moe_layers), config.router.num_experts), jnp.int32)


def _two_scalars(found: Any) -> tuple[Array, Array]:
    """What a loss gave, as float32. Raises an `InputError` if that is anything else."""
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(found)]
    if not isinstance(found, tuple) or len(found) != 2 or shapes != [(), ()]:
        raise InputError(
            f"loss: gives a {type(found).__name__} with arrays of shapes {shapes}; expected two "
            "scalars, a sum and its weight"
        )
    total, weight = (jnp.asarray(value, jnp.float32) for value in found)
    return total, weight


def _not_zero(weight: Array) -> Array:
    """A weight to divide by; of a batch without any weight, the sum is 0 too."""
    return jnp.where(weight == 0, 1.0, weight)


def _split(batch: Batch, parts: int) -> Any:
    """Batch rows split into micro-batches, `[M, B / M, S]`; every device keeps its own rows."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )
