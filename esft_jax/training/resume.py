"""What a checkpoint of a run depends on, and how the run goes on from it."""

from collections.abc import Iterator
from typing import Any

import jax
import optax

from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.optimizer_config import OptimizerConfig
from esft_jax.training.checkpoint import Checkpoints, Position, abstract_state
from esft_jax.training.optimizer import changed_rate
from esft_jax.training.setup import Setup
from esft_jax.training.state import TrainState
from esft_jax.training.step import Loss


def facts_of(
    setup: Setup, trained: Trained, opt_state: optax.OptState, loss: Loss
) -> dict[str, Any]:
    """What must not change between a checkpoint and its resumption."""
    experts = trained.experts if isinstance(trained, LoRA) else trained
    return {
        **setup.identity,
        "experts": experts and {str(k): list(v) for k, v in experts.experts.items()},
        "data_sha256": setup.train_set.stats.sha256,
        # Validation data choose the best step.
        "valid_sha256": {name: s.stats.sha256 for name, s in setup.valid_sets.items()},
        # Of a caller's own optimizer or loss, no more can be known.
        "optimizer_state": ", ".join(_states(opt_state)),
        "loss": getattr(loss, "__qualname__", type(loss).__name__),
    }


def _states(opt_state: Any) -> Iterator[str]:
    """Names of the states of an optimizer, from the outside in, and the types of their arrays."""
    level = jax.tree_util.default_registry.flatten_one_level(opt_state)
    children = level[0] if level else ()
    inner = [name for child in children for name in _states(child)]
    types = {str(leaf.dtype) for leaf in jax.tree.leaves(opt_state)}
    if hasattr(opt_state, "_fields") and types:
        name = type(opt_state).__name__
        yield name if inner else f"{name} of {' and '.join(sorted(types))}"
    yield from inner


def restore(
    checkpoints: Checkpoints, state: TrainState, shardings: TrainState, iterator: Any
) -> tuple[TrainState, Position]:
    """The state and position of the last checkpoint; the iterator goes on from there.

    Raises:
        InputError: it, or the best one, belongs to another run or is damaged.
    """
    abstract = abstract_state(state, shardings)
    state, position = checkpoints.restore(abstract)
    iterator.set_state(position.data)
    if checkpoints.best_step is not None:
        # Read for its checksums: damage is to be known now, not at the end.
        checkpoints.restore_best(abstract)
    return state, position


def new_rate(optimizer: OptimizerConfig, before: int, steps: int, state: TrainState) -> str | None:
    """What another number of steps does to the learning rate of a resumed run; None if nothing.

    Args:
        before, steps: of the run until now, and from now on.
    """
    done = int(state.step)
    if done >= steps:
        return None
    return changed_rate(optimizer, before, steps, done - int(state.skipped))
