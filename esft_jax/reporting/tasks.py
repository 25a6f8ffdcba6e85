"""The tasks of a report: where their scores and routing are read, and what follows from them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64

from esft_jax.checkpoint.identity import check_same_base
from esft_jax.errors import InputError
from esft_jax.reporting import analysis
from esft_jax.reporting.selection import Run, Selection, find_run
from esft_jax.routing.log import RoutingLog, load_routing
from esft_jax.routing.scores import (
    ROUTING_METHODS,
    ExpertScores,
    as_wide,
    load_scores,
    round_scores,
)
from esft_jax.selection_config import ScoreMethod
from esft_jax.training.run_folder import RunFolder

MIN_SEQUENCES = 8  # of fewer, resamples say nothing


@dataclass(frozen=True)
class Task:
    """Scores of one task, its routing where it was kept, and the run they are of."""

    name: str
    source: str
    scores: ExpertScores
    log: RoutingLog | None
    run: Run | None


@dataclass(frozen=True)
class Choice:
    """The chosen experts of a task.

    Attributes:
        selection: how they were chosen.
        ranked: by layer, the chosen ids in descending score.
        shares: of each layer's gate mass.
        served: share of each layer's assignments that the chosen experts serve.
        gate: gate mass of the chosen experts, which is their gate share if the router renormalises.
        met: share of tokens that meet at least one of them in the layer.
        certainty: share of resamples that choose each expert.
        count_range: 5th and 95th percentile of the number chosen.
        sizes: agreement of two independent samples, by size.
        halves: scores of two samples without a common sequence.
        agreements: by each other method, with the experts that it would choose: as many in each
            layer (see `analysis.agreement`).
    """

    task: Task
    selection: Selection
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
    agreements: dict[ScoreMethod, float]

    @property
    def scores(self) -> Float64[np.ndarray, "L E"]:
        """The scores that decide the choice."""
        return self.task.scores.of(self.selection.method)

    @property
    def reached(self) -> float:
        """What a layer's chosen scores sum to: the threshold, or without one the mean of it."""
        if self.selection.top_p is not None:
            return self.selection.top_p
        return float((self.scores * self.chosen).sum(axis=1).mean())

    @property
    def even_count(self) -> int:
        """Experts per layer that would reach as much if all had the same score."""
        mass = float(self.scores.sum(axis=1).mean())
        num_experts = self.scores.shape[1]
        return int(min(np.ceil(round(self.reached / mass * num_experts, 6)), num_experts))

    @property
    def counts(self) -> Int64[np.ndarray, " L"]:
        """Chosen experts of each layer."""
        return self.chosen.sum(axis=1)


@dataclass(frozen=True)
class Named:
    """An argument of the command: a task's name, where its scores are, and the run in there."""

    name: str
    path: Path
    run: Run | None


def read_arguments(arguments: Sequence[str]) -> list[Named]:
    """Read `[NAME=]PATH` arguments.

    Raises:
        InputError: naming the argument, or the file of a run that is wrong.
    """
    found: list[Named] = []
    for argument in arguments:
        name, given, text = argument.partition("=")
        given = "" if Path(argument).exists() else given  # a path may have a "=", too
        path = Path(text if given else argument)
        if not given:
            name = _name(path.absolute())
        if not name or any(other.name == name for other in found):
            raise InputError(f"{argument}: {name!r} names no new task; expected NAME=PATH")
        found.append(Named(name, path, find_run(path)))
    return found


def read_tasks(
    arguments: Sequence[Named], experts_per_token: int, num_experts: int | None = None
) -> list[Task]:
    """Read the scores of run folders, or what `load_scores` reads.

    Args:
        experts_per_token: of routing logs, which do not say it.
        num_experts: of a layer; default: the most of any task.

    Raises:
        InputError: naming the argument or file that is wrong.
    """
    tasks: list[Task] = []
    for named in arguments:
        folder = named.path
        if named.run is not None:
            folder = named.run.scores
        elif RunFolder(folder).scores.is_dir():
            folder = RunFolder(folder).scores
        scores = load_scores(folder, experts_per_token=experts_per_token)
        log = load_routing(folder) if scores.routing is None else None
        if log is not None and (log.layers, log.num_experts) != (scores.layers, scores.num_experts):
            raise InputError(f"{folder}: scores and routing are of different models")
        tasks.append(Task(named.name, str(named.path), scores, log, named.run))
    wide = as_wide([task.scores for task in tasks], num_experts)
    tasks = [
        replace(task, scores=scores, log=task.log or scores.routing)
        for task, scores in zip(tasks, wide, strict=True)
    ]
    first = tasks[0]
    for number, task in enumerate(tasks):
        for other in tasks[:number]:  # some may not say it
            base = other.scores.provenance
            check_same_base(task.scores.provenance, base, task.source, "measured on")
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


def choose(task: Task, selection: Selection, top_k: int) -> Choice:
    """All that is asked about one task."""
    scores, log, rule = task.scores, task.log, selection.rule
    chosen = selection.chosen(scores)
    gate = scores.of(scores.gate_method)
    met = certainty = count_range = halves = None
    sizes: list[analysis.SampleSize] = []
    if log is not None:
        met = (analysis.tuned_met(log, chosen) > 0).mean(axis=1)
    if log is not None and log.num_sequences >= 2:
        counts, gates = log.sequence_sums()
        halves = analysis.alternate_halves(gates)
        known = selection.method in ROUTING_METHODS
        if rule is not None and known and log.num_sequences >= MIN_SEQUENCES:
            sums = counts / log.top_k
            if selection.method != "token":
                _, sums = log.sequence_sums(shares=selection.method == "gate_share")
            lengths = np.diff(log.starts)
            resampled = analysis.resampled_choices(sums, lengths, rule)
            certainty = resampled.mean(axis=0)
            low, high = np.percentile(resampled.sum(axis=(1, 2)), (5, 95)).round()
            count_range = int(low), int(high)
            sizes = analysis.sample_sizes(sums, lengths, rule, top_k)
    return Choice(
        task=task,
        selection=selection,
        chosen=chosen,
        ranked=tuple(selection.experts.experts.get(layer, ()) for layer in scores.layers),
        shares=analysis.mass_shares(gate),
        served=(scores.token * chosen).sum(axis=1),
        gate=(gate * chosen).sum(axis=1),
        met=met,
        certainty=certainty,
        count_range=count_range,
        sizes=sizes,
        halves=halves,
        agreements={
            method: _agreement(scores.of(method), chosen)
            for method in scores.methods
            if method != selection.method
        },
    )


def _agreement(scores: Float[np.ndarray, "L E"], chosen: Bool[np.ndarray, "L E"]) -> float:
    ranks = np.argsort(np.argsort(-round_scores(scores), axis=1, kind="stable"), axis=1)
    other = ranks < chosen.sum(axis=1, keepdims=True)
    return float(analysis.agreement(chosen, other)) if chosen.any() else 0.0
