"""The tasks of a report: where their scores and routing are read, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from esft_jax.errors import InputError
from esft_jax.experts.routing_log import RoutingLog, load_routing
from esft_jax.experts.scores import (
    ExpertScores,
    ScoreMethod,
    as_wide,
    load_scores,
    round_scores,
)
from esft_jax.experts.select import chosen_mask, rank_and_take
from esft_jax.hf.identity import check_same_base
from esft_jax.reporting import analysis
from esft_jax.training.run_folder import RunFolder

MIN_SEQUENCES = 8  # of fewer, resamples say nothing


@dataclass(frozen=True)
class Task:
    """Scores of one task, and its routing where it was kept."""

    name: str
    source: str
    scores: ExpertScores
    log: RoutingLog | None


@dataclass(frozen=True)
class Choice:
    """What one method and threshold make of a task.

    Attributes:
        ranked: by layer, the chosen ids in descending score.
        served: share of each layer's assignments that the chosen experts serve.
        gate: gate mass of the chosen experts.
        met: share of tokens that meet at least one of them in the layer.
        certainty: share of resamples that choose each expert.
        count_range: 5th and 95th percentile of the number chosen.
        sizes: agreement of two independent samples, by size.
        halves: scores of two samples without a common sequence.
    """

    task: Task
    chosen: Bool[np.ndarray, "L E"]
    ranked: tuple[tuple[int, ...], ...]
    shares: Float64[np.ndarray, "L E"]
    served: Float64[np.ndarray, " L"]
    gate: Float64[np.ndarray, " L"]
    met: Float64[np.ndarray, " L"] | None
    certainty: Float64[np.ndarray, "L E"] | None
    count_range: tuple[int, int] | None
    sizes: list[analysis.SampleSize]
    halves: tuple[Float[np.ndarray, "L E"], Float[np.ndarray, "L E"]] | None

    @property
    def counts(self) -> Int64[np.ndarray, " L"]:
        """Chosen experts of each layer."""
        return self.chosen.sum(axis=1)


def read_tasks(
    arguments: Sequence[str], experts_per_token: int, num_experts: int | None = None
) -> list[Task]:
    """Read `[NAME=]PATH` arguments: a run folder, or what `load_scores` reads.

    Args:
        experts_per_token: of routing logs, which do not say it.
        num_experts: of a layer; default: the most of any task.

    Raises:
        InputError: naming the argument or file that is wrong.
    """
    tasks: list[Task] = []
    for argument in arguments:
        name, found, text = argument.partition("=")
        found = "" if Path(argument).exists() else found  # a path may have a "=", too
        path = Path(text if found else argument)
        folder = RunFolder(path).scores if RunFolder(path).scores.is_dir() else path
        if not found:
            name = _name(path.absolute())
        if not name or any(task.name == name for task in tasks):
            raise InputError(f"{argument}: {name!r} names no new task; expected NAME=PATH")
        scores = load_scores(folder, experts_per_token=experts_per_token)
        log = load_routing(folder) if scores.routing is None else None
        if log is not None and (log.layers, log.num_experts) != (scores.layers, scores.num_experts):
            raise InputError(f"{folder}: scores and routing are of different models")
        tasks.append(Task(name, str(path), scores, log))
    wide = as_wide([task.scores for task in tasks], num_experts)
    tasks = [
        replace(task, scores=scores, log=task.log or scores.routing)
        for task, scores in zip(tasks, wide, strict=True)
    ]
    first = tasks[0]
    for task in tasks[1:]:
        check_same_base(task.scores.provenance, first.scores.provenance, task.source, "measured on")
        if task.scores.layers != first.scores.layers or task.scores.token.shape != (
            first.scores.token.shape
        ):
            raise InputError(
                f"{task.source}: {task.scores.token.shape[0]} layers of {task.scores.num_experts}"
                f" experts, but {first.source} has {first.scores.token.shape[0]} of"
                f" {first.scores.num_experts}; expected scores of one model"
            )
    return tasks


def _name(path: Path) -> str:
    if path.name == "scores":
        return path.parent.name
    return path.stem if path.is_file() else path.name


def choose(task: Task, method: ScoreMethod, top_p: float, top_k: int) -> Choice:
    """All that is asked about one task."""
    scores, log = task.scores, task.log
    values = round_scores(scores.of(method))  # as `select_experts` does
    order, taken = rank_and_take(values, top_p)
    chosen = chosen_mask(values, top_p)
    met = certainty = count_range = halves = None
    sizes: list[analysis.SampleSize] = []
    if log is not None:
        met = (analysis.tuned_met(log, chosen) > 0).mean(axis=1)
    if log is not None and log.num_sequences >= 2:
        counts, gates = log.sequence_sums()
        halves = analysis.alternate_halves(gates)
        if log.num_sequences >= MIN_SEQUENCES:
            sums = gates if method == "gate" else counts / log.top_k
            lengths = np.diff(log.starts)
            resampled = analysis.resampled_choices(sums, lengths, top_p)
            certainty = resampled.mean(axis=0)
            low, high = np.percentile(resampled.sum(axis=(1, 2)), (5, 95)).round()
            count_range = int(low), int(high)
            sizes = analysis.sample_sizes(sums, lengths, top_p, top_k)
    return Choice(
        task=task,
        chosen=chosen,
        ranked=tuple(tuple(ids[mask].tolist()) for ids, mask in zip(order, taken, strict=True)),
        shares=analysis.gate_shares(scores.gate),
        served=(scores.token * chosen).sum(axis=1),
        gate=(scores.gate * chosen).sum(axis=1),
        met=met,
        certainty=certainty,
        count_range=count_range,
        sizes=sizes,
        halves=halves,
    )
