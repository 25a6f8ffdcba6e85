"""What a sweep compares: a run configuration, and what changes in it from cell to cell."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from esft_jax import strict_yaml
from esft_jax.config import RunConfig, load_config
from esft_jax.errors import InputError
from esft_jax.files import local_path
from esft_jax.values import LocalPath, Positive, Seed, Text

# Every task is also judged with the base alone, under this name.
BASE = "base"


def _plain_name(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]{,63}", name) or name == BASE:
        raise ValueError(
            f"expected a name of at most 64 of a-z, 0-9, '-' and '.', not {BASE!r}, got {name!r}"
        )
    return name


def _of_file(tasks: object) -> object:
    return strict_yaml.read_mapping(local_path(tasks)) if isinstance(tasks, str) else tasks


Name = Annotated[Text, AfterValidator(_plain_name)]
Overrides = tuple[Text, ...]
Tasks = Annotated[dict[Name, Overrides], BeforeValidator(_of_file), Field(min_length=1)]


def _key(override: str) -> str:
    return override.partition("=")[0]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SweepConfig:
    """A table of methods x tasks x seeds.

    Attributes:
        output: Folder of the sweep.
        run: Run configuration that every cell begins with.
        overrides: What all cells change in it (`key=value`), the base's too: another model, say.
        tasks: For each task, what it changes (`key=value`): its data, its metric. Or a YAML file of
            them, for sweeps over the same tasks.
        methods: For each method, what it changes.
        seeds: One run for each.
        learning_rates: For each method that has some, learning rates that are tried on all tasks
            with the first seed. The one with the lowest validation loss, averaged over the tasks,
            is used with the other seeds.
    """

    output: LocalPath
    run: LocalPath
    tasks: Tasks
    methods: Annotated[dict[Name, Overrides], Field(min_length=1)]
    overrides: Overrides = ()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    learning_rates: dict[Name, Annotated[tuple[Positive, ...], Field(min_length=1)]] = (
        dataclasses.field(default_factory=dict)
    )

    def __post_init__(self) -> None:
        """Check what concerns several keys; the message starts with the key to change."""
        for method in self.learning_rates:
            if method not in self.methods:
                raise ValueError(
                    f"learning_rates.{method}: no such method; expected one of "
                    f"{', '.join(self.methods)}"
                )
            names = [f"{rate:g}" for rate in self.learning_rates[method]]
            if len(set(names)) < len(names):
                raise ValueError(
                    f"learning_rates.{method}: two are the same in six digits, by which their "
                    "folders are named; expected different ones"
                )
            if "optimizer.learning_rate" in map(_key, self.methods[method]):
                raise ValueError(
                    f"methods.{method}: optimizer.learning_rate is among learning_rates; expected "
                    "one of them"
                )
        places = {"overrides": self.overrides}
        places |= {f"tasks.{name}": overrides for name, overrides in self.tasks.items()}
        places |= {f"methods.{name}": overrides for name, overrides in self.methods.items()}
        for place, overrides in places.items():
            for key in map(_key, overrides):
                if key in ("output", "seed"):
                    expected = {"output": "output", "seed": "seeds"}[key]
                    raise ValueError(
                        f"{place}: {key} is what the sweep sets; expected its {expected} instead"
                    )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is named twice; expected different ones")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a sweep; `method` may be `BASE`, which trains nothing.

    Attributes:
        learning_rate: if the method tries several; None leaves the run configuration's.
    """

    task: str
    method: str
    learning_rate: float | None
    seed: int

    @property
    def name(self) -> str:
        """Path of its folder in that of the sweep."""
        rate = "" if self.learning_rate is None else f"/lr-{self.learning_rate:g}"
        return f"{self.task}/{self.method}{rate}/seed-{self.seed}"


def load_sweep(path: str | Path) -> SweepConfig:
    """Read a sweep and check the configuration of each of its cells.

    Raises:
        InputError: naming the file and the line, or the cell and what is wrong with it.
    """
    sweep = strict_yaml.load(SweepConfig, path)
    base = {cell.task: run_config(sweep, cell) for cell in base_cells(sweep)}
    devices = next(iter(base.values())).mesh.cpu_devices
    for cell in [*base_cells(sweep), *all_cells(sweep)]:
        config = run_config(sweep, cell)
        if config.evaluation.data is None or not config.data.valid:
            raise InputError(
                f"{path}: tasks.{cell.task}: cells are compared by evaluation.data and data.valid; "
                "expected both"
            )
        if _judged_by(config) != _judged_by(base[cell.task]):
            raise InputError(
                f"{path}: methods.{cell.method}: changes data.valid, its format or columns, or "
                "evaluation; expected the same for all methods, since they are compared by these"
            )
        if config.mesh.cpu_devices != devices:
            raise InputError(
                f"{path}: cell {cell.name}: mesh.cpu_devices is {config.mesh.cpu_devices}, and "
                f"{devices} for the first; expected one number, since one process runs all cells"
            )
    return sweep


def _judged_by(config: RunConfig) -> tuple[object, ...]:
    data = config.data
    return (
        data.format,
        data.columns,
        data.valid,
        data.train if isinstance(data.valid, float) else (),
        dataclasses.replace(config.evaluation, batch_size=1),
    )


def run_config(sweep: SweepConfig, cell: Cell) -> RunConfig:
    """The configuration of a cell's run."""
    overrides = [*sweep.overrides, *sweep.tasks[cell.task], *sweep.methods.get(cell.method, ())]
    if cell.learning_rate is not None:
        overrides.append(f"optimizer.learning_rate={cell.learning_rate}")
    output = str(Path(sweep.output) / "cells" / cell.name)
    # Quoted, since a path may hold what means something in YAML.
    overrides += [f"seed={cell.seed}", f"output={json.dumps(output, ensure_ascii=False)}"]
    try:
        return load_config(sweep.run, overrides)
    except InputError as error:
        raise InputError(f"cell {cell.name}: {error}") from None


def config_sha256(config: RunConfig) -> str:
    """Tells configurations of runs apart, wherever they are written to.

    Of what differs from the defaults: keys that a later version adds change nothing.
    """
    content = _chosen(dataclasses.replace(config, output="unset"))
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _chosen(value: Any) -> Any:
    """As JSON, without what has its default."""
    if isinstance(value, dict):
        return {key: _chosen(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_chosen(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return value
    content = {}
    for field in dataclasses.fields(value):
        made = field.default_factory
        default = field.default if made is dataclasses.MISSING else made()
        if (chosen := getattr(value, field.name)) != default:
            content[field.name] = _chosen(chosen)
    return content


def base_cells(sweep: SweepConfig) -> list[Cell]:
    """The base alone, on each task."""
    return [Cell(task, BASE, None, sweep.seeds[0]) for task in sweep.tasks]


def search_cells(sweep: SweepConfig) -> Iterator[Cell]:
    """What decides on the learning rates: every one on all tasks, with the first seed."""
    for method in sweep.methods:
        for rate in sweep.learning_rates.get(method, (None,)):
            for task in sweep.tasks:
                yield Cell(task, method, rate, sweep.seeds[0])


def method_cells(sweep: SweepConfig, method: str, rate: float | None) -> list[Cell]:
    """All seeds of a method with one learning rate."""
    return [Cell(task, method, rate, seed) for seed in sweep.seeds for task in sweep.tasks]


def all_cells(sweep: SweepConfig) -> Iterator[Cell]:
    """Every cell that may be run, whichever learning rates turn out best."""
    for method in sweep.methods:
        for rate in sweep.learning_rates.get(method, (None,)):
            yield from method_cells(sweep, method, rate)
