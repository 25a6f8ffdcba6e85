"""Saving and restoring a run with Orbax: asynchronous, atomic, tuned state only."""

import dataclasses
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from esft_jax.errors import InputError
from esft_jax.training.relayout import Rows, move_rows, saved_shapes
from esft_jax.training.state import TrainState
from esft_jax.training.timing import Spent


@dataclass(frozen=True)
class Position:
    """Where a run is, besides its parameters.

    Attributes:
        data: the data iterator's state, plain JSON.
        best_loss: lowest validation loss so far.
        spent: time, see `RunTiming`.
    """

    data: Any
    best_loss: float | None
    spent: Spent


class Checkpoints:
    """The checkpoints of a run: the last one, and the one with the best validation loss.

    A checkpoint holds the trained parameters, the optimizer's state, the position in the data,
    `facts` about the run that a restore must find unchanged, and which row of the tuned bank holds
    which expert. Frozen weights are never in it. It can be restored on another mesh.
    Orbax writes to a temporary folder and renames it, so a half-written one is never found.

    Args:
        rows: of the tuned bank, if there is one.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], rows: Rows | None):
        self._facts, self._rows = facts, rows and [row and list(row) for row in rows]
        # Both may be writing the same step: processes that wait for each other must know for which.
        self._last, self._best = (
            ocp.CheckpointManager(
                (folder / name).absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=1,
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        barrier_sync_key_prefix=name
                    ),
                ),
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

    def save(self, step: int, state: TrainState, position: Position) -> None:
        """Save for resuming, in the background."""
        if step != self.last_step:
            content = dataclasses.asdict(position) | {"facts": self._facts}
            self._save(self._last, step, state, content)

    def save_best(self, step: int, state: TrainState) -> None:
        """Keep the trained parameters of the best evaluation, in the background."""
        self._save(self._best, step, state.tuned, {})

    def _save(
        self, manager: ocp.CheckpointManager, step: int, state: Any, position: dict[str, Any]
    ) -> None:
        with _failed_writes(manager.directory):
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    position=ocp.args.JsonSave(position | {"rows": self._rows}),
                ),
            )

    def check(self) -> None:
        """Raise an `InputError` if a checkpoint could not be written in the background."""
        for manager in (self._last, self._best):
            with _failed_writes(manager.directory):
                manager.check_for_errors()

    def restore(self, abstract: TrainState) -> tuple[TrainState, Position]:
        """The last checkpoint: the state, placed like `abstract`, and the saved position.

        Raises:
            InputError: the checkpoint belongs to other facts (base weights, experts, data).
        """
        step = self.last_step
        position = self._position(self._last)
        # The facts come first: with other experts the arrays would not even have these shapes.
        for key, value in self._facts.items():
            if position["facts"].get(key) != value:
                raise InputError(
                    f"{self._last.directory}: checkpoint of step {step} has {key} = "
                    f"{position['facts'].get(key)!r}; this run has {value!r}"
                )
        state = self._state(self._last, abstract, position["rows"])
        names = [field.name for field in dataclasses.fields(Position)]
        return state, Position(**{name: position[name] for name in names})

    def restore_best(self, abstract: TrainState) -> Any:
        """Trained parameters of the best evaluation."""
        with _failed_writes(self._best.directory):
            self._best.wait_until_finished()
        return self._state(self._best, abstract.tuned, self._position(self._best)["rows"])

    def _position(self, manager: ocp.CheckpointManager) -> Any:
        wanted = ocp.args.Composite(position=ocp.args.JsonRestore())
        return manager.restore(manager.latest_step(), args=wanted).position

    def _state(self, manager: ocp.CheckpointManager, abstract: Any, rows: Rows | None) -> Any:
        def read(target: Any) -> Any:
            wanted = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            return manager.restore(manager.latest_step(), args=wanted).state

        if rows is None or self._rows is None or rows == self._rows:
            return read(abstract)
        restored = read(saved_shapes(abstract, rows))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return move_rows(restored, rows, self._rows, shardings)

    def close(self) -> None:
        """Wait until everything is on disk."""
        for manager in (self._last, self._best):
            with _failed_writes(manager.directory):
                manager.wait_until_finished()
            manager.close()


@contextmanager
def _failed_writes(folder: os.PathLike[str]) -> Iterator[None]:
    """Say in one line what the system says: no space left, no permission, ..."""
    try:
        yield
    except (OSError, ValueError) as error:
        # tensorstore has no type of its own for it.
        found = re.search(r"os_error_code='(\d+)'", str(error))
        code = error.errno if isinstance(error, OSError) else found and int(found[1])
        if not code:
            raise
        raise InputError(
            f"{folder}: a checkpoint cannot be written: {os.strerror(code)}; the last complete one "
            "stays"
        ) from error


def abstract_state(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes, types and places of a state, to restore into."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings,
    )
