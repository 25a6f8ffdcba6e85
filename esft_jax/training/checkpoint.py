"""Saving and restoring a run with Orbax: asynchronous, atomic, tuned state only."""

import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from esft_jax.errors import InputError
from esft_jax.training.checksum import checksums, json_checksum
from esft_jax.training.relayout import Rows, move_rows, saved_shapes
from esft_jax.training.state import TrainState
from esft_jax.training.timing import Spent

# tensorstore has no type of its own for what the system refuses.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


@dataclass(frozen=True)
class Position:
    """Where a run is, besides its parameters.

    Attributes:
        data: the data iterator's state, plain JSON.
        best_loss: lowest validation loss so far.
        steps: that the run was to make, which its learning rate may depend on; None if an older
            version wrote it.
        spent: time, see `RunTiming`.
        stopping: what early stopping goes by; None if an older version wrote it.
    """

    data: Any
    best_loss: float | None
    steps: int | None
    spent: Spent
    stopping: dict[str, Any] | None = None


class Checkpoints:
    """The checkpoints of a run: the last ones, and the one with the best validation loss.

    A checkpoint holds the trained parameters, the optimizer's state, the position in the data,
    `facts` about the run that a restore must find unchanged, and which row of the tuned bank holds
    which expert. Frozen weights are never in it. It can be restored on another mesh.
    Orbax writes to a temporary folder and renames it, so a half-written one is never found. It does
    not notice flipped bits, so checksums are saved, too, and compared when it is read.
    Those before the last are kept for the case that the last is damaged.

    Args:
        rows: of the tuned bank, if there is one.
        keep: how many to resume from are kept.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], rows: Rows | None, keep: int = 2):
        self._quiet = ExitStack()
        self._quiet.enter_context(_one_voice())
        self._facts, self._rows = facts, rows and [row and list(row) for row in rows]
        # Both may be writing the same step: processes that wait for each other tell them apart by
        # these prefixes.
        self._last, self._best = (
            ocp.CheckpointManager(
                (folder / name).absolute(),
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=most,
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        barrier_sync_key_prefix=name
                    ),
                ),
            )
            for name, most in (("last", keep), ("best", 1))
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
            # It records `best_loss`: the checkpoint with that loss must be complete first.
            with _failed_writes(self._best.directory):
                self._best.wait_until_finished()
            content = dataclasses.asdict(position) | {"facts": self._facts}
            self._save(self._last, step, state, content)

    def save_best(self, step: int, state: TrainState) -> None:
        """Keep the trained parameters of the best evaluation, in the background."""
        self._save(self._best, step, state.tuned, {})

    def _save(
        self, manager: ocp.CheckpointManager, step: int, state: Any, position: dict[str, Any]
    ) -> None:
        position |= {"rows": self._rows, "checksums": checksums(state)}
        # As it will be read: JSON has no integers as keys, and no tuples.
        position = json.loads(json.dumps(position))
        position["checksum"] = json_checksum(position)
        with _failed_writes(manager.directory):
            manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    position=ocp.args.JsonSave(position),
                ),
            )

    def check(self) -> None:
        """Raise an `InputError` if a checkpoint could not be written in the background."""
        for manager in (self._last, self._best):
            with _failed_writes(manager.directory):
                manager.check_for_errors()

    def restore(self, abstract: TrainState) -> tuple[TrainState, Position]:
        """The last checkpoint: the state, placed like `abstract`, and the saved position.

        A best checkpoint of a later step is deleted.

        Raises:
            InputError: the checkpoint belongs to other facts (base weights, experts, data), as far
                as it names them, or is damaged.
        """
        step = self.last_step
        assert step is not None
        position = self._position(self._last)
        # The facts come first: with other experts the arrays would not even have these shapes.
        for key, value in self._facts.items():
            found = position["facts"].get(key, value)  # older versions name fewer
            if found != value:
                raise InputError(
                    f"{self._last.directory}: checkpoint of step {step} has {key} = {found!r}; "
                    f"this run has {value!r}"
                )
        position = {"steps": None, "stopping": None} | position
        names = [field.name for field in dataclasses.fields(Position)]
        if missing := [name for name in names if name not in position]:
            raise InputError(
                f"{self._last.directory}: checkpoint of step {step} has no {missing[0]}; expected "
                "one that this version wrote"
            )
        state = self._state(self._last, abstract, position)
        if self.best_step is not None and self.best_step > step:
            # The run continues before that step. The best checkpoint until here is not kept.
            self._best.delete(self.best_step)
        return state, Position(**{name: position[name] for name in names})

    def restore_best(self, abstract: TrainState) -> Any:
        """Trained parameters of the best evaluation. Raises an `InputError` if it is damaged."""
        with _failed_writes(self._best.directory):
            self._best.wait_until_finished()
        return self._state(self._best, abstract.tuned, self._position(self._best))

    def _position(self, manager: ocp.CheckpointManager) -> Any:
        wanted = ocp.args.Composite(position=ocp.args.JsonRestore())
        with self._damage(manager):
            position = manager.restore(manager.latest_step(), args=wanted).position
            if position.pop("checksum") != json_checksum(position):
                raise ValueError("the checksum of position/ differs")
        return position

    def _state(
        self, manager: ocp.CheckpointManager, abstract: Any, position: dict[str, Any]
    ) -> Any:
        before, after = position["rows"], self._rows
        moved = before is not None and after is not None and before != after
        target = saved_shapes(abstract, before) if moved else abstract
        with self._damage(manager):
            wanted = ocp.args.Composite(state=ocp.args.StandardRestore(target))
            state = manager.restore(manager.latest_step(), args=wanted).state
            found = checksums(state)
            for name, value in position["checksums"].items():
                if found.get(name) != value:
                    raise ValueError(f"the checksum of {name} differs")
        if before is None or after is None or before == after:
            return state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        return move_rows(state, before, after, shardings)

    @contextmanager
    def _damage(self, manager: ocp.CheckpointManager) -> Iterator[None]:
        """Say which checkpoint cannot be read, and how to go on without it."""
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # Orbax raises whatever its parsers do, and plain `Exception`
            step, before = manager.latest_step(), sorted(manager.all_steps())[:-1]
            if manager is self._best:
                effect = "later evaluations choose the best one"
            elif before:
                effect = f"the run continues from step {before[-1]}"
            else:
                effect = "the run begins anew"
            first = (str(error).splitlines() or [""])[0][:200]
            raise InputError(
                f"{manager.directory / str(step)}: damaged checkpoint ({first}); "
                f"without this folder, {effect}"
            ) from error

    def close(self) -> None:
        """Wait until everything is on disk."""
        for manager in (self._last, self._best):
            with _failed_writes(manager.directory):
                manager.wait_until_finished()
            manager.close()
        self._quiet.close()  # after a failure threads may still be at work


def _is_no_write(record: logging.LogRecord) -> bool:
    return _OS_ERROR.search(str(record.exc_info and record.exc_info[1])) is None


@contextmanager
def _one_voice() -> Iterator[None]:
    """Silence other reports of failed writes: `_failed_writes` reports them in one line.

    Threads of Orbax log the same error, each with a traceback; those of tensorstore print another
    one, since their results are not awaited any more; and asyncio logs the errors of all
    writes that failed beside the first one.
    """

    def unrelated(record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR or "orbax" not in record.pathname

    def print_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    logger, before = logging.getLogger("absl"), sys.unraisablehook
    logger.addFilter(unrelated)
    # This filter stays: asyncio logs the error of a task whenever the task is collected.
    logging.getLogger("asyncio").addFilter(_is_no_write)
    sys.unraisablehook = print_others
    try:
        yield
    finally:
        logger.removeFilter(unrelated)
        sys.unraisablehook = before


@contextmanager
def _failed_writes(folder: os.PathLike[str]) -> Iterator[None]:
    """Say in one line what the system says: no space left, no permission, ..."""
    try:
        yield
    except (OSError, ValueError) as error:
        found = _OS_ERROR.search(str(error))
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
