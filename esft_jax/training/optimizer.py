"""The optimizer of a configuration, for the tuned partition; nothing for the frozen one."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from esft_jax.adapt.partition import FROZEN, TUNED, decays
from esft_jax.adapt.parts import RatePart, check_rates, part_of
from esft_jax.optimizer_config import OptimizerConfig
from esft_jax.training.factored import scale_by_factored_rms
from esft_jax.training.muon import orthogonalises, scale_by_muon
from esft_jax.training.state import tuned_only

_OTHER = "other"  # what has no rate of its own


def make_schedule(
    config: OptimizerConfig, steps: int, part: RatePart | None = None
) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0, then what `config.schedule` names.

    Args:
        steps: of the run.
        part: one of `config.rates`; None: what is in none of these parts.
    """
    peak = config.learning_rate if part is None else config.rates[part]
    final, warmup = config.final_lr_fraction * peak, config.warmup(steps)
    rest = max(steps - warmup, 1)
    after: optax.Schedule
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_lr_fraction)
        case "wsd":  # warm-up, stable, decay (arXiv 2404.06395)
            decay = config.decay(steps)
            after = optax.join_schedules(
                [optax.constant_schedule(peak), optax.linear_schedule(peak, final, decay)],
                [steps - warmup - decay],
            )
        case "inverse_sqrt":

            def after(update: Any) -> Any:
                # Asked for updates of the warm-up, too, which count as negative ones.
                return peak * jnp.sqrt(warmup / (warmup + jnp.maximum(update, 0)))

    if not warmup:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def changed_rate(config: OptimizerConfig, before: int, steps: int, updates: int) -> str | None:
    """What another number of steps does to the learning rate of a run; None if nothing.

    Args:
        before, steps: of the run until now, and from now on.
        updates: made so far.
    """
    old, new = (float(make_schedule(config, count)(updates)) for count in (before, steps))
    if old == new:
        return None
    why = "the warm-up is over a share"
    if config.schedule in ("linear", "cosine", "wsd"):
        why = f"the {config.schedule} schedule is over all"
    return (
        f"train.steps: {steps} instead of {before}; {why} of them, so the "
        f"learning rate of the next update is {new:.3g} instead of {old:.3g}"
    )


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As optax's, but by one factor for all gradients. Optax divides each gradient; XLA stores the
    quotients, since they are used twice: a copy of all gradients, and a pass over them.
    """

    def clip(gradients: optax.Updates, _: optax.Params | None) -> optax.Updates:
        factor = max_norm / jnp.maximum(optax.tree.norm(gradients), max_norm)
        return jax.tree.map(lambda gradient: gradient * factor, gradients)

    return optax.stateless(clip)


def _parts(tuned: nnx.State, config: OptimizerConfig) -> nnx.State:
    """For each value, the part whose rate it has."""
    check_rates(config.rates, {param.role for _, param in nnx.to_flat_state(tuned)})
    return nnx.map_state(
        lambda _, param: param.replace(part_of(param.role, config.rates) or _OTHER), tuned
    )


def _direction(config: OptimizerConfig, mesh: Mesh | None) -> optax.GradientTransformation:
    """What an optimizer makes of gradients, before weight decay and the learning rate."""
    match config.name:
        case "adafactor":
            return scale_by_factored_rms()
        case "lion":
            return optax.scale_by_lion(config.beta1, config.beta2)
        case "sgd":
            return optax.trace(config.momentum) if config.momentum else optax.identity()
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    if config.name == "adamw":
        return adam
    assert config.momentum is not None

    def labels(params: dict[str, Any]) -> dict[str, Any]:
        tuned = nnx.map_state(lambda _, p: p.replace(orthogonalises(p)), params[TUNED])
        return params | {TUNED: tuned}

    return optax.multi_transform({True: scale_by_muon(config.momentum, mesh), False: adam}, labels)


def make_optimizer(
    config: OptimizerConfig, steps: int, mesh: Mesh | None = None
) -> optax.GradientTransformation:
    """The update of `{"tuned": ..., "frozen": ...}`.

    Clipping sees the tuned gradients only, those of all parts together; the frozen partition has no
    state and its update is zero. Norm scales are not decayed.

    The last step, which multiplies by the learning rate, is another one for each part that has its
    own; moments and decay do not depend on it.

    Args:
        mesh: that the parameters lie on.

    Raises:
        InputError: in `init`, for the rate of a part that no tuned parameter is in.
    """
    if config.rates:
        rate = optax.multi_transform(
            {
                part or _OTHER: optax.scale_by_learning_rate(make_schedule(config, steps, part))
                for part in (None, *config.rates)
            },
            lambda params: {TUNED: _parts(params[TUNED], config), FROZEN: params[FROZEN]},
        )
    else:
        rate = optax.scale_by_learning_rate(make_schedule(config, steps))
    update = optax.chain(
        _direction(config, mesh),
        optax.add_decayed_weights(
            config.weight_decay,
            lambda params: {TUNED: decays(params[TUNED]), FROZEN: params[FROZEN]},
        ),
        rate,
    )
    return tuned_only(optax.chain(_clip_by_global_norm(config.clip_norm), update))
