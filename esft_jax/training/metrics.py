"""What a run logs: names in groups, and figures of the updates since the last line."""

import dataclasses
import re
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from esft_jax.training.timing import Percentiles

_SPEED = re.compile(r"tokens_per_second|model_flops_|mfu$|step_seconds_|input_seconds|peak_memory_")


def grouped(name: str) -> str:
    """The name of a metric in its group, from that without groups: in older runs' files, or of a
    train step.
    """
    if name.startswith(("train/", "valid/", "speed/", "experts/")) or name in ("step", "time"):
        return name
    if name.startswith("valid_"):
        return f"valid/{name.removeprefix('valid_')}"
    return f"speed/{name}" if _SPEED.match(name) else f"train/{name}"


class Interval:
    """The metrics of updates, which stay on the devices until a line is logged."""

    def __init__(self) -> None:
        self._updates: list[Mapping[str, Any]] = []

    def __len__(self) -> int:
        return len(self._updates)

    def add(self, metrics: Mapping[str, jax.Array]) -> None:
        """One more update was started; see `make_train_step`."""
        self._updates.append(metrics)

    def take(self) -> dict[str, float]:
        """One figure of each metric over the updates since the last call; waits for them.

        Losses are means over tokens, by `target_tokens` or `loss_weight`, which are summed up;
        `skipped` counts from the first step; all else are means over updates. What is not finite,
        as of an update that was skipped, is left out.
        """
        updates = jax.device_get(self._updates)
        self._updates.clear()
        return {name: _over(name, updates) for name in updates[0]}


def _over(name: str, updates: Sequence[Mapping[str, np.ndarray]]) -> float:
    values = _column(name, updates)
    if name == "skipped":
        return float(values[-1])
    if name.startswith(("target_tokens", "loss_weight")):
        return float(values[np.isfinite(values)].sum())
    weights = np.ones_like(values)
    if re.match("loss($|/)", name):
        weight = "loss_weight" if "loss_weight" in updates[0] else "target_tokens"
        weights = _column(name.replace("loss", weight, 1), updates)
    known = np.isfinite(values) & np.isfinite(weights)
    total = weights[known].sum()
    return float(values[known] @ weights[known] / total) if total else np.nan


def _column(name: str, updates: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    return np.array([update[name] for update in updates], np.float64)


def speed_of(
    steps: Sequence[float],
    waited: float,
    tokens: int,
    flops: float,
    peak_flops: float | None,
) -> dict[str, float]:
    """Figures of the updates since the last line.

    Args:
        steps: seconds of each.
        waited: seconds for batches, of all of them.
        tokens: positions of an update, padding included.
        flops: operations of an update that the method needs, of each device.
        peak_flops: operations a second that the chip is made for, where it is known.
    """
    updates = len(steps) / sum(steps)
    rate = tokens * updates
    return {
        "speed/tokens_per_second": rate,
        "speed/tokens_per_second_per_process": rate / jax.process_count(),
        "speed/model_flops_per_second_per_device": flops * updates,
        **({} if peak_flops is None else {"speed/mfu": flops * updates / peak_flops}),
        **{
            f"speed/step_seconds_{name}": value
            for name, value in dataclasses.asdict(Percentiles.of(steps)).items()
        },
        "speed/input_seconds": waited / len(steps),
    }


def peak_memory() -> int:
    """Most bytes in use so far: on the first local device, or by the process on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
