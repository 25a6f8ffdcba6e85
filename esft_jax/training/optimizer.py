"""AdamW for the tuned partition, nothing for the frozen one."""

import jax
import jax.numpy as jnp
import optax

from esft_jax.adapt.partition import FROZEN, TUNED, decays
from esft_jax.config import OptimizerConfig


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate by update: linear warm-up from 0, then constant or cosine decay."""
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(
            config.learning_rate,
            max(steps - config.warmup_steps, 1),
            alpha=config.final_lr_fraction,
        )
    else:
        after = optax.constant_schedule(config.learning_rate)
    if not config.warmup_steps:
        return after
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def changed_rate(config: OptimizerConfig, before: int, steps: int, updates: int) -> str | None:
    """What another number of steps does to the learning rate of a run; None if nothing.

    Args:
        before, steps: of the run until now, and from now on.
        updates: made so far.
    """
    old, new = (float(make_schedule(config, count)(updates)) for count in (before, steps))
    if old == new:
        return None
    return (
        f"train.steps: {steps} instead of {before}; the {config.schedule} schedule is over all of "
        f"them, so the learning rate of the next update is {new:.3g} instead of {old:.3g}"
    )


def _clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """As optax's, by one factor for all gradients. Optax divides each of them, which XLA does not
    repeat for each use: that is a copy of them all, and a pass of its own.
    """

    def clip(gradients: optax.Updates, _: optax.Params | None) -> optax.Updates:
        factor = max_norm / jnp.maximum(optax.tree.norm(gradients), max_norm)
        return jax.tree.map(lambda gradient: gradient * factor, gradients)

    return optax.stateless(clip)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The update of `{"tuned": ..., "frozen": ...}`.

    Clipping sees the tuned gradients only; the frozen partition has no state and its update is
    zero. Norm scales are not decayed.
    """
    adamw = optax.chain(
        _clip_by_global_norm(config.clip_norm),
        optax.adamw(
            make_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=lambda params: {
                TUNED: decays(params[TUNED]),
                FROZEN: params[FROZEN],
            },
        ),
    )
    return optax.multi_transform(
        {TUNED: adamw, FROZEN: optax.set_to_zero()}, {TUNED: TUNED, FROZEN: FROZEN}
    )
