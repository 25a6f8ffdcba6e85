"""All checks of a run on the device at hand."""

import dataclasses
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

import esft_jax
from esft_jax.accelerators import peaks_of
from esft_jax.checking.check import Finding, check_kernels
from esft_jax.checking.kernel import Limits, Subject
from esft_jax.checking.small_step import check_steps
from esft_jax.checkpoint.load import local_folder
from esft_jax.config import QuantiseConfig, RunConfig
from esft_jax.data_config import DataConfig
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.planning.analysis import what_is_trained

# Checked where no configuration is named: latent attention with experts as they are, and grouped
# attention with experts in 4 bits.
_MODELS = {
    "deepseek-v2-lite": QuantiseConfig(),
    "qwen3-30b-a3b": QuantiseConfig(experts="int4"),
}


@dataclass(frozen=True)
class Report:
    """What was found of a run.

    Attributes:
        model: as the configuration names it.
        described: what is trained, in words.
        device: what JAX calls it.
        seconds: that all checks took.
    """

    model: str
    described: str
    device: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def problems(self) -> list[str]:
        """What is wrong, and what to do: a line each."""
        return [finding.problem for finding in self.findings if finding.problem]

    def to_json(self) -> dict[str, Any]:
        """All of it, for a JSON file; there is no infinity in JSON."""
        values = dataclasses.asdict(self)
        for finding in values["findings"]:
            for name in ("error", "tolerance"):
                finding[name] = finding[name] if math.isfinite(finding[name]) else None
        return values | {"jax": jax.__version__, "right": not self.problems}


def default_configs() -> Iterator[RunConfig]:
    """The runs that are checked where none is named; their files do not matter.

    Raises:
        InputError: the package lies alone, without the models of its repository.
    """
    models = Path(esft_jax.__file__).parents[1] / "models"
    for name, quantise in _MODELS.items():
        if not (models / name / "config.json").is_file():
            raise InputError(
                f"--config: missing, and {models / name} is not here; expected a configuration file"
            )
        data = DataConfig(train=("none.jsonl",))
        yield RunConfig(str(models / name), "none", data, quantise=quantise)


def check_run(config: RunConfig, experts_per_layer: int | None = None) -> Report:
    """Check what a configuration would use: its kernels, and a training step.

    Of its files, only the model's `config.json` is read.

    Args:
        experts_per_layer: see `planning.analysis.open_case`.

    Raises:
        InputError: naming what does not fit together, or what the device cannot do.
        RunFailed: see `check_steps`.
    """
    begin = time.perf_counter()
    model = load_model_config(local_folder(config.model, files=("config.json",)))
    trained, described = what_is_trained(config, model, experts_per_layer)
    length = config.data.sequence_length
    subject = Subject(model, trained, config.quantise.chosen, config.dtype, length)
    device = jax.devices()[0]
    kernels = check_kernels(subject, Limits.here(), peaks_of(device.device_kind))
    findings = (*kernels, *check_steps(config, subject))
    seconds = time.perf_counter() - begin
    return Report(config.model, described, device.device_kind, findings, seconds)
