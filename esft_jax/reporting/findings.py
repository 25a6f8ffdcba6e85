"""What a report says: numbers first, then the sentences that they allow."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.reporting import analysis
from esft_jax.reporting.cost import Cost, CostModel
from esft_jax.reporting.selection import find_selection
from esft_jax.reporting.tasks import Choice, Task, choose
from esft_jax.reporting.vocabulary import Word, rank_words
from esft_jax.routing.scores import ROUTING_METHODS, SCORE_METHODS, score_words
from esft_jax.routing.select import chosen_mask
from esft_jax.selection_config import ScoreMethod

ENOUGH = 0.9  # agreement of two samples from which more tokens change little
SURE = 0.8  # of the resamples choose an expert
NEARLY_EVEN = 1.25  # even routing would take this many times the experts


@dataclass(frozen=True)
class Threshold:
    """What one p chooses of a task.

    Attributes:
        share: chosen experts, of all.
        served: share of assignments that they serve, mean over layers.
    """

    top_p: float
    count: int
    share: float
    served: float
    cost: Cost | None


@dataclass(frozen=True)
class Findings:
    """All numbers of a report.

    Attributes:
        overlap: see `analysis.overlap`, for the tasks whose routing is known; None without.
        thresholds: for each task, by ascending p.
        costs: None where the model's `config.json` is not known.
        model: whose it is.
        words: for each task, see `rank_words`.
    """

    top_k: int
    layers: tuple[int, ...]
    num_experts: int
    choices: list[Choice]
    overlap: Float64[np.ndarray, "Q Q"] | None
    thresholds: list[list[Threshold]]
    costs: CostModel | None
    model: str | None
    words: list[list[Word] | None]

    @property
    def methods(self) -> list[ScoreMethod]:
        """Those by which some task has scores."""
        found = {method for choice in self.choices for method in choice.task.scores.methods}
        return [method for method in SCORE_METHODS if method in found]

    @property
    def gate_method(self) -> ScoreMethod:
        """What gate scores are: `gate`, or `gate_share` where the router renormalises its gates."""
        kinds = {choice.task.scores.gate_method for choice in self.choices}
        return "gate" if kinds == {"gate"} else "gate_share"

    @property
    def enough(self) -> float:
        """See `ENOUGH`."""
        return ENOUGH

    @property
    def chance(self) -> float:
        """Top-K experts that two unrelated samples share."""
        return analysis.chance_shared(self.top_k, self.num_experts)


def find(
    tasks: Sequence[Task],
    method: ScoreMethod | None,
    top_p: float | None,
    top_k: int,
    costs: CostModel | None = None,
    tokenizer: Tokenizer | None = None,
    model: str | None = None,
) -> Findings:
    """Ask every question of every task.

    Args:
        method, top_p: see `find_selection`.
        costs, tokenizer, model: see `Findings`.

    Raises:
        InputError: the model of `costs`, or the experts of a run, do not fit the scores.
    """
    scores = tasks[0].scores
    if costs is not None:
        shape = costs.config.moe_layers, costs.config.router.num_experts
        if shape != (scores.layers, scores.num_experts):
            raise InputError(
                f"{tasks[0].source}: scores of {len(scores.layers)} layers with"
                f" {scores.num_experts} experts; the model has {len(shape[0])} with {shape[1]}"
            )
    choices = [
        choose(task, find_selection(task.scores, task.run, method, top_p), top_k) for task in tasks
    ]
    halves = [choice.halves for choice in choices if choice.halves is not None]
    return Findings(
        top_k=top_k,
        layers=scores.layers,
        num_experts=scores.num_experts,
        choices=choices,
        overlap=analysis.overlap(halves, top_k) if halves else None,
        thresholds=[_thresholds(choice, costs) for choice in choices],
        costs=costs,
        model=model,
        words=[rank_words(choice.task.log, choice.chosen, tokenizer) for choice in choices],
    )


def _thresholds(choice: Choice, costs: CostModel | None) -> list[Threshold]:
    # Beyond the smallest mass of a layer, p takes the whole layer.
    end = float(choice.scores.sum(axis=1).min())
    step = 0.05 if end > 0.6 else 0.02
    grid = {round(p, 4) for p in np.arange(step, end + 1e-6, step).tolist()}
    if choice.selection.top_p is not None:
        grid.add(choice.selection.top_p)
    rows, token = [], choice.task.scores.token
    for p in sorted(p for p in grid if p <= 1):
        chosen = chosen_mask(choice.scores, p)
        cost = None if costs is None else cost_of(choice, costs, chosen)
        served = float((token * chosen).sum(axis=1).mean())
        rows.append(Threshold(p, int(chosen.sum()), float(chosen.mean()), served, cost))
    return rows


def cost_of(choice: Choice, costs: CostModel, chosen: Bool[np.ndarray, "L E"]) -> Cost:
    """Of some routed experts, and of what a task's run trains besides."""
    return costs.of(chosen, choice.task.scores.token, choice.selection.experts.also)


@dataclass(frozen=True)
class Answers:
    """The answers for one task, a few plain sentences each."""

    fit: str
    which: str
    why: str
    sure: str
    cost: str


def answers(findings: Findings, index: int) -> Answers:
    """Whether ESFT suits, which experts, why, how sure, at what cost."""
    choice = findings.choices[index]
    counts, total = choice.counts, choice.chosen.size
    share = choice.chosen.mean()
    served, even = choice.served.mean(), choice.even_count
    fewer = even / counts.mean()
    fit = (
        f"The task reaches p = {choice.reached:.3g} with {share:.1%} of the experts. If they were"
        f" all used alike, it would take {even / findings.num_experts:.1%}: {fewer:.1f} times as"
        " many."
    )
    if fewer < NEARLY_EVEN:
        fit += " Routing is close to even, so that choosing experts saves little."
    else:
        fit += " The routing is concentrated, which is what ESFT makes use of."
    which = (
        f"{counts.sum()} of {total:,} experts, {_span(counts.min(), counts.max())} in a layer; they"
        f" are framed and listed below. {choice.selection.note}"
    ).rstrip()
    mass = analysis.top_k_mass(choice.shares, findings.top_k).mean()
    why = (
        f"They serve {served:.1%} of the task's assignments, {served / share:.1f} times their"
        f" number's share. The best {findings.top_k} experts of a layer hold {mass:.1%} of its gate"
        f" mass; evenly it would be {findings.top_k / findings.num_experts:.1%}."
    )
    if choice.met is not None:
        why += f" {choice.met.mean():.0%} of tokens meet at least one of them in a layer."
    return Answers(fit, which, why, sure(choice), _cost(findings, index))


def sure(choice: Choice) -> str:
    """How far the sample carries the choice, and what to do about it."""
    if choice.selection.rule is None:
        return (
            "Not known: the scores of this task alone do not say why these experts were chosen"
            f" ({choice.selection.words}), so they cannot be chosen again from other samples."
        )
    if choice.selection.method not in ROUTING_METHODS:
        return (
            f"Not known: {score_words(choice.selection.method)}s are kept of the whole sample only,"
            " so experts cannot be chosen again from parts of it."
        )
    if choice.certainty is None or choice.count_range is None:
        return (
            "Not known: these scores came without the routing of single tokens, or with too few"
            " sequences. Score again with `score`, which keeps it."
        )
    certainty = choice.certainty[choice.chosen]
    low, high = choice.count_range
    doubtful = int((certainty < SURE).sum())
    text = (
        f"Nine resamples in ten choose {_span(low, high)} experts. Each of the {certainty.size} is"
        f" chosen by {certainty.mean():.0%} of them on average, {doubtful or 'none'} by less than"
        f" {SURE:.0%}."
    )
    return f"{text} {recommendation(choice)}"


def recommendation(choice: Choice) -> str:
    """A plain word on how many tokens to score."""
    if not choice.sizes or choice.task.log is None:
        return "Too few sequences to say how many tokens are enough."
    have = choice.task.log.num_tokens
    enough = next((size for size in choice.sizes if size.agreement[1] >= ENOUGH), None)
    last = choice.sizes[-1]
    if enough is not None:
        return (
            f"Two independent samples of {enough.tokens:,} tokens agree on"
            f" {enough.agreement[1]:.0%} of their experts, so these {have:,} tokens are enough."
        )
    return (
        f"Two independent samples of {last.tokens:,} tokens agree on only {last.agreement[1]:.0%}"
        f" of their experts; score more than these {have:,} tokens if the choice matters."
    )


def _cost(findings: Findings, index: int) -> str:
    if findings.costs is None:
        return (
            f"{findings.choices[index].chosen.mean():.1%} of the routed experts are trained. With"
            " --model, a folder that holds the model's config.json, the report adds parameters,"
            " bytes and operations."
        )
    choice, full = findings.choices[index], findings.costs.full
    cost = cost_of(choice, findings.costs, choice.chosen)
    share = cost.parameters / full.parameters
    return (
        f"{count_text(cost.parameters)} parameters are trained, {share:.1%} of the model:"
        f" {size_text(cost.adapter_bytes)} as an adapter in bfloat16 instead of"
        f" {size_text(full.adapter_bytes)}, {size_text(cost.state_bytes)} of training state instead"
        f" of {size_text(full.state_bytes)}, and {cost.operations / full.operations:.0%} of the"
        " operations of full fine-tuning."
    )


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low} to {high}"


def count_text(number: float) -> str:
    """A count for the eye: `1.07 billion`."""
    for unit, name in ((1e9, " billion"), (1e6, " million")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:,.0f}"


def size_text(size: float) -> str:
    """Bytes for the eye, in powers of ten: `2.15 GB`."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"
