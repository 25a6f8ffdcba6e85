"""The folder of one run: what lies where, whose it is, and whether it may be continued."""

import math
import re
import reprlib
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from esft_jax.checkpoint.folder import check_way
from esft_jax.config import RunConfig, changes, load_config, save_config
from esft_jax.errors import InputError
from esft_jax.files import (
    check_no_links,
    check_writable,
    checked,
    read_json_lines,
    read_text,
    visible,
    write_text_atomic,
)
from esft_jax.lock import NoLocks, locked
from esft_jax.training.metrics import grouped

# What a resumed run may change without becoming another run.
_CHANGEABLE = {
    "mesh.data",
    "mesh.expert",
    "mesh.replica",
    "mesh.transport",
    "mesh.cpu_devices",
    "frozen_memory",
    "data.cache",
    "train.steps",
    "train.epochs",
    "train.eval_every",
    "train.early_stopping.patience",
    "train.early_stopping.min_delta",
    "train.save_every",
    "train.keep_checkpoints",
    "train.log_every",
    "train.log_to",
    "train.remat",
    "train.verify_frozen",
    "train.max_skipped",
    "train.profile_step",
    "train.profile_steps",
}

_DAY = 86_400  # seconds by which the clocks of hosts may differ


class RunFolder:
    """Paths of a run's files.

    config.yaml        the resolved configuration
    scores/            expert scores, if the run measured them
    expert_cfg.json    the selected experts
    checkpoints/       `last` to resume from, `best` by validation loss
    metrics.jsonl      one line per logged step; `tensorboard/`, and `wandb/`, hold the same
    started            when the run was first started, seconds since the epoch
    profile/           profiler traces
    skipped/           for every skipped update, the examples of its batch
    adapter/           the result of `esft`, the trained experts, or of `lora`, the factors
    model/             the result of `full`: a Hugging Face folder
    evaluation/        completions, scores and comparisons, in folders by what they depend on
    .lock              held by the process that works on it
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.scores = self.path / "scores"
        self.expert_cfg = self.path / "expert_cfg.json"
        self.checkpoints = self.path / "checkpoints"
        self.last = self.checkpoints / "last"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.started = self.path / "started"
        self.profile = self.path / "profile"
        self.skipped = self.path / "skipped"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.evaluation = self.path / "evaluation"
        self._lock = self.path / ".lock"
        self._owned = False

    @contextmanager
    def owned(self) -> Iterator[None]:
        """Keep other processes from changing the run, for the time of the block.

        Blocks of one `RunFolder` may be nested.

        Raises:
            InputError: another process does so already.
        """
        if self._owned:
            yield
            return
        with ExitStack() as stack:
            try:
                ours = stack.enter_context(locked(self._lock))
            except NoLocks as error:
                warnings.warn(f"{error}: start no other process on this run", stacklevel=2)
                ours = True
            if not ours:
                raise InputError(
                    f"output: {self.path}: another process works on this run; expected its end, or "
                    "another folder"
                )
            self._owned = True
            try:
                yield
            finally:
                self._owned = False

    def check(self, config: RunConfig) -> None:
        """Refuse a folder that holds something else, or a run that cannot be continued so.

        Raises:
            InputError: naming the folder and the first setting that differs, or a damaged file.
        """
        self.check_way()
        check_writable(self.path, "output")
        if not self.path.exists():
            return
        if not self.config.exists():
            # `score` and `evaluate` may have written here before, and `select` a file that the run
            # names.
            ours = {self.scores, self.evaluation}
            if config.expert_cfg is not None and self.expert_cfg.exists():
                ours |= {self.expert_cfg} if self.expert_cfg.samefile(config.expert_cfg) else set()
            if not ours.issuperset(visible(self.path)):
                raise InputError(
                    f"output: {self.path} is not empty and holds no run; expected a new folder"
                )
            return
        changeable = _CHANGEABLE
        if config.train.balance_loss == 0:  # else it depends on how a batch is split
            changeable = changeable | {"train.micro_batches"}
        for key, before, value in changes(load_config(self.config), config):
            section = key.split(".")[0]
            if key.endswith("format") and None in (before, value):
                continue  # of the same data, the same format is recognised
            if key not in changeable and section not in ("evaluation", "output"):
                raise InputError(
                    f"output: {self.path} holds a run with {key} = {before!r}, not {value!r}; "
                    "expected the same settings to resume it, or another folder"
                )
        done = self.last_step()
        # Epochs are counted as steps once the data are read, and checked then.
        if done is not None and config.train.epochs is None and done > config.train.steps:
            raise InputError(
                f"train.steps: {config.train.steps}; the run in {self.path} has made {done} "
                "updates; expected at least as many, or another folder"
            )
        if self.started.exists():
            self.begun()
        for _ in self.logged():
            pass

    def check_way(self) -> None:
        """Refuse links, which would lead writing out of the folder, and what lies in the place of a
        result but is not one.

        Raises:
            InputError: naming the link or file.
        """
        for path in vars(self).values():
            if isinstance(path, Path) and path != self.path:  # which may be a link itself
                check_no_links(path)
        for result in (self.adapter, self.model):
            check_way(result, replace=True)

    def create(self, config: RunConfig) -> None:
        """Make the folder of a new run, with its configuration; one that is there stays."""
        if not self.config.exists():
            self.keep(config)
        if not self.started.exists():
            write_text_atomic(self.started, f"{time.time()}\n")

    def keep(self, config: RunConfig) -> None:
        """Write the resolved configuration, once the run goes on with it."""
        save_config(config, self.config)

    def begun(self) -> float:
        """When the run was first started, seconds since the epoch.

        Raises:
            InputError: the file does not say it.
        """
        text = read_text(self.started).strip()
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not 0 < found < time.time() + _DAY:
            raise InputError(
                f"{self.started}: is {reprlib.repr(text)}; expected when the run was first "
                "started, in seconds since the epoch; without the file it counts from now"
            )
        return found

    def last_step(self) -> int | None:
        """Updates done at the last complete checkpoint; None without one."""
        names = [path.name for path in self.last.glob("*")]
        return max((int(name) for name in names if re.fullmatch("[0-9]+", name)), default=None)

    def logged(self) -> Iterator[dict[str, float]]:
        """The lines of `metrics.jsonl`, but for one that a crash cut off.

        Names are grouped (`train/loss`), also of what older versions wrote.

        Raises:
            InputError: naming the line that is damaged.
        """
        if not self.metrics.exists():
            return
        for where, line in read_json_lines(self.metrics, growing=True):
            checked(dict[str, float], line, where)
            checked(int, line.get("step"), f"{where}: step")
            yield {grouped(name): value for name, value in line.items()}
