"""One optimizer update, and one evaluation, as compiled functions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from esft_jax.adapt.partition import FROZEN, TUNED
from esft_jax.adapt.tuned import TunedParam
from esft_jax.model.params import Role
from esft_jax.model.remat import Remat
from esft_jax.model.router import RouterOutput
from esft_jax.model.transformer import Transformer
from esft_jax.ops.cross_entropy import cross_entropy_sums
from esft_jax.training.state import TrainState

Batch = dict[str, Array]
TrainStep = Callable[[TrainState, nnx.State, Batch], tuple[TrainState, dict[str, Array]]]


def loss_sum(
    model: Transformer, batch: Batch, remat: Remat = "none", *, experts_learn: bool = False
) -> tuple[Float[Array, ""], RouterOutput]:
    """Sum over tokens of weight times loss in nats, and the router outputs.

    The last two arguments are those of `Transformer.hidden_states`.
    """
    total, _, router = loss_sums(model, batch, remat, experts_learn=experts_learn)
    return total, router


def loss_sums(
    model: Transformer, batch: Batch, remat: Remat = "none", *, experts_learn: bool = False
) -> tuple[Float[Array, ""], Float[Array, " B"], RouterOutput]:
    """As `loss_sum`; between them, the sum of each row, which cannot be differentiated."""
    hidden, router = model.hidden_states(
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        remat=remat,
        experts_learn=experts_learn,
    )
    total, rows = cross_entropy_sums(
        hidden, model.head_weight(), batch["targets"], batch["loss_weights"], model.mesh
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


def balance_loss(router: RouterOutput) -> Float[Array, ""]:
    """Load-balancing loss, summed over MoE layers; 1 per layer when the load is uniform.

    `sum_e f_e P_e` with f the share of assignments times E and P the mean share of the scores over
    the batch's tokens (arXiv 2405.04434, equations 23 to 25; 2412.19437, 17 to 20).
    """
    num_experts, top_k = router.scores.shape[-1], router.expert_ids.shape[-1]

    def layer(ids: Array, scores: Array) -> Array:
        # Softmax scores have the sum 1 already; those of tokens that are masked out are all 0.
        probs = scores / jnp.maximum(scores.sum(axis=-1, keepdims=True), 1e-20)
        counts = jnp.zeros(num_experts).at[ids.reshape(-1)].add(1.0, mode="drop")
        tokens = jnp.maximum(counts.sum() / top_k, 1.0)
        share = counts * num_experts / (top_k * tokens)
        return jnp.sum(share * probs.reshape(-1, num_experts).sum(axis=0) / tokens)

    return jax.vmap(layer)(router.expert_ids, router.scores).sum()


def make_train_step(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    *,
    micro_batches: int = 1,
    remat: Remat = "none",
    balance_weight: float = 0.0,
    sources: Sequence[str] = (),
) -> TrainStep:
    """A pure function `(state, frozen, batch) -> (state, metrics)`; see `jit_train_step`.

    The loss is the mean over the tokens of the whole batch, however they fall on micro-batches.
    Where it or a gradient is not finite, parameters and optimizer stay as they are.
    Gradients are taken with respect to the tuned partition alone.

    Args:
        sources: names of the sources of mixed batches, for their losses and tokens in the metrics.
    """

    def objective(
        tuned: nnx.State, frozen: nnx.State, batch: Batch, total_weight: Array
    ) -> tuple[Array, tuple[Array, Array, tuple | None]]:
        model = nnx.merge(graph, tuned, frozen)
        experts_learn = any(
            param.role is Role.ROUTED_EXPERT and not isinstance(param, TunedParam | nnx.LoRAParam)
            for _, param in nnx.to_flat_state(tuned)
        )
        nll, rows, router = loss_sums(model, batch, remat, experts_learn=experts_learn)
        loss = nll / total_weight
        by_source = sums_by_source(rows, batch, len(sources)) if sources else None
        if not balance_weight:
            return loss, (loss, jnp.zeros(()), by_source)
        balance = balance_loss(router) / micro_batches
        return loss + balance_weight * balance, (loss, balance, by_source)

    def step(
        state: TrainState, frozen: nnx.State, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        total_weight = jnp.maximum(batch["loss_weights"].sum(), 1.0)
        gradient = jax.grad(objective, has_aux=True)

        def accumulate(totals: tuple, micro: Batch) -> tuple[tuple, None]:
            return jax.tree.map(
                jnp.add, totals, gradient(state.tuned, frozen, micro, total_weight)
            ), None

        if micro_batches == 1:
            grads, (loss, balance, by_source) = gradient(state.tuned, frozen, batch, total_weight)
        else:
            none_yet = (jnp.zeros(len(sources)),) * 2 if sources else None
            zeros = (
                jax.tree.map(jnp.zeros_like, state.tuned),
                (jnp.zeros(()), jnp.zeros(()), none_yet),
            )
            (grads, (loss, balance, by_source)), _ = jax.lax.scan(
                accumulate, zeros, _split(batch, micro_batches)
            )
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        skipped = state.skipped + ~finite
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "target_tokens": total_weight,
            "skipped": skipped,
        }
        if balance_weight:
            metrics["balance_loss"] = balance
        if by_source is not None:
            for name, nll, weight in zip(sources, *by_source, strict=True):
                metrics[f"loss/{name}"] = nll / weight  # not a number without tokens: not logged
                metrics[f"target_tokens/{name}"] = weight

        def update(tuned: nnx.State, opt_state: optax.OptState) -> tuple:
            # `multi_transform` wants a tree for the frozen partition; these zeros are never
            # computed since their updates are not read.
            updates, opt_state = optimizer.update(
                {TUNED: grads, FROZEN: jax.tree.map(jnp.zeros_like, frozen)},
                opt_state,
                {TUNED: tuned, FROZEN: frozen},
            )
            return optax.apply_updates(tuned, updates[TUNED]), opt_state

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


def jit_train_step(step: TrainStep, shardings: Any) -> jax.stages.Wrapped:
    """Jit a train step: the state is updated in place, and stays where `shardings` say."""
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def make_eval_step(
    graph: nnx.GraphDef,
) -> Callable[[nnx.State, nnx.State, Batch], tuple[Array, Array]]:
    """A pure function `(tuned, frozen, batch) -> (summed loss in nats, summed weight)`."""

    def step(tuned: nnx.State, frozen: nnx.State, batch: Batch) -> tuple[Array, Array]:
        total, _ = loss_sum(nnx.merge(graph, tuned, frozen), batch)
        return total, batch["loss_weights"].sum()

    return step


def _split(batch: Batch, parts: int) -> Batch:
    """Batch rows dealt out to micro-batches, `[M, B / M, S]`; every device keeps its own rows."""
    return jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )
