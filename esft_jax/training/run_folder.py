"""The folder of one run: what lies where, and whether it may be continued."""

import dataclasses
import time
from pathlib import Path
from typing import Any

from esft_jax.config import RunConfig, load_config, save_config
from esft_jax.errors import InputError
from esft_jax.files import check_no_links, check_writable, read_text, visible, write_text_atomic
from esft_jax.hf.folder import check_way

# What a resumed run may change without becoming another run.
_CHANGEABLE = {
    "mesh.data",
    "mesh.expert",
    "mesh.replica",
    "mesh.transport",
    "mesh.cpu_devices",
    "train.steps",
    "train.eval_every",
    "train.save_every",
    "train.log_every",
    "train.remat",
    "train.verify_frozen",
    "train.max_skipped",
    "train.profile_step",
    "train.profile_steps",
}


class RunFolder:
    """Paths of a run's files.

    config.yaml        the resolved configuration
    scores/            expert scores, if the run measured them
    expert_cfg.json    the selected experts
    checkpoints/       `last` to resume from, `best` by validation loss
    metrics.jsonl      one line per logged step; `tensorboard/` holds the same
    started            when the run was first started, seconds since the epoch
    profile/           profiler traces
    skipped/           for every skipped update, the examples of its batch
    adapter/           the result of `esft`, the trained experts, or of `lora`, the factors
    model/             the result of `full`: a Hugging Face folder
    evaluation/        completions, scores and comparisons, in folders by what they depend on
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.scores = self.path / "scores"
        self.expert_cfg = self.path / "expert_cfg.json"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.started = self.path / "started"
        self.profile = self.path / "profile"
        self.skipped = self.path / "skipped"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.evaluation = self.path / "evaluation"

    def check(self, config: RunConfig) -> None:
        """Refuse a folder that holds something else, or a run with other settings.

        Raises:
            InputError: naming the folder, and the first setting that differs.
        """
        check_writable(self.path, "output")
        self.check_way()
        if not self.path.exists():
            return
        if not self.config.exists():
            # `score` and `evaluate` may have been here before, and a `select` that the run names.
            ours = {self.scores, self.evaluation}
            if config.expert_cfg is not None and self.expert_cfg.exists():
                ours |= {self.expert_cfg} if self.expert_cfg.samefile(config.expert_cfg) else set()
            if not ours.issuperset(visible(self.path)):
                raise InputError(
                    f"output: {self.path} is not empty and holds no run; expected a new folder"
                )
            return
        changeable = _CHANGEABLE
        if config.train.balance_loss == 0:  # which is computed for each micro-batch
            changeable = changeable | {"train.micro_batches"}
        saved = _flat(dataclasses.asdict(load_config(self.config)))
        asked = _flat(dataclasses.asdict(config))
        for key in [*asked, *saved]:
            section = key.split(".")[0]
            if key in changeable or section in ("evaluation", "output"):
                continue
            before, value = saved.get(key), asked.get(key)  # sources of data.mix come and go
            if before != value:
                raise InputError(
                    f"output: {self.path} holds a run with {key} = {before!r}, not {value!r}; "
                    "expected the same settings to resume it, or another folder"
                )

    def check_way(self) -> None:
        """Refuse links, which lead writing out of the folder, and what is no older result.

        Raises:
            InputError: naming the link or file.
        """
        for path in vars(self).values():
            if path != self.path:  # which may be a link itself
                check_no_links(path)
        for result in (self.adapter, self.model):
            check_way(result, replace=True)

    def create(self, config: RunConfig) -> None:
        """Make the folder and write the resolved configuration."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"output: {self.path}: {error.strerror}") from None
        save_config(config, self.config)
        if not self.started.exists():
            write_text_atomic(self.started, f"{time.time()}\n")

    def begun(self) -> float:
        """When the run was first started, seconds since the epoch."""
        return float(read_text(self.started))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
