"""Saving and restoring a run with Orbax: asynchronous, atomic, tuned state only."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from esft_jax.errors import InputError
from esft_jax.training.state import TrainState


class Checkpoints:
    """The checkpoints of a run: the last one, and the one with the best validation loss.

    A checkpoint holds the trained parameters, the optimizer's state, the position in the data and
    `facts` about the run that a restore must find unchanged. Frozen weights are never in it.
    Orbax writes to a temporary folder and renames it, so a half-written one is never found.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self._facts = facts
        self._last, self._best = (
            ocp.CheckpointManager(
                (folder / name).absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=1)
            )
            for name in ("last", "best")
        )

    @property
    def last_step(self) -> int | None:
        """Updates done at the last checkpoint; None without one."""
        return self._last.latest_step()

    @property
    def best_step(self) -> int | None:
        """Updates done at the checkpoint with the best validation loss; None without one."""
        return self._best.latest_step()

    def save(self, step: int, state: TrainState, data: Any, best_loss: float | None) -> None:
        """Save for resuming, in the background.

        Args:
            data: the data iterator's state, plain JSON.
            best_loss: lowest validation loss so far.
        """
        if step != self.last_step:
            position = {"data": data, "best_loss": best_loss, "facts": self._facts}
            self._last.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(position)
                ),
            )

    def save_best(self, step: int, state: TrainState) -> None:
        """Keep the trained parameters of the best evaluation, in the background."""
        self._best.save(step, args=ocp.args.StandardSave(state.tuned))

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The last checkpoint: the state, placed like `abstract`, and the saved position.

        Raises:
            InputError: the checkpoint belongs to other facts (base weights, experts, mesh).
        """
        step = self.last_step
        # The facts come first: with another layout the arrays would not even have these shapes.
        position = self._last.restore(
            step, args=ocp.args.Composite(position=ocp.args.JsonRestore())
        ).position
        for key, value in self._facts.items():
            if position["facts"].get(key) != value:
                raise InputError(
                    f"{self._last.directory}: checkpoint of step {step} has {key} = "
                    f"{position['facts'].get(key)!r}; this run has {value!r}"
                )
        restored = self._last.restore(
            step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        )
        return restored.state, position

    def restore_best(self, abstract: TrainState) -> Any:
        """Trained parameters of the best evaluation."""
        self._best.wait_until_finished()
        return self._best.restore(self.best_step, args=ocp.args.StandardRestore(abstract.tuned))

    def close(self) -> None:
        """Wait until everything is on disk."""
        for manager in (self._last, self._best):
            manager.wait_until_finished()
            manager.close()


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes, types and places of a state, to restore into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
