"""The experts of a task that a report is about: what a run trained, or what a threshold takes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from esft_jax import strict_yaml
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.config import RunConfig
from esft_jax.errors import InputError
from esft_jax.routing.choose import describe
from esft_jax.routing.scores import ExpertScores, round_scores, score_words
from esft_jax.routing.select import budget_mask, chosen_mask, top_k_mask
from esft_jax.selection_config import DEFAULT_TOP_P, ScoreMethod
from esft_jax.training.run_folder import RunFolder

Rule = Callable[[Float[np.ndarray, "*N L E"]], Bool[np.ndarray, "*N L E"]]


@dataclass(frozen=True)
class Run:
    """A run whose task is reported on.

    Attributes:
        experts: that it trained, or updated; None where it trains all, or has not chosen yet.
    """

    folder: RunFolder
    config: RunConfig
    experts: ExpertConfig | None

    @property
    def scores(self) -> Path:
        """Where the scores of its task are.

        Raises:
            InputError: there are none.
        """
        given, config = self.config.select.scores, self.config
        if self.folder.scores.is_dir():
            return self.folder.scores
        if len(given) == 1:
            return Path(given[0])
        if given:
            why = f"its experts are those of {len(given)} tasks; expected one of {', '.join(given)}"
        elif config.selects_experts and config.expert_cfg is None:
            why = "it has not measured any yet; expected a run that has"
        else:
            why = "its experts were given" if config.selects_experts else self.trains_all
            command = f"python -m esft_jax.score --config {self.folder.config}"
            why += f", so it measured none; expected them after `{command}`"
        raise InputError(f"{self.folder.path}: the run has no scores: {why}")

    @property
    def trains_all(self) -> str:
        """What a run without selected experts does."""
        what = "updates all experts or none" if self.config.method == "lora" else "trains all"
        return f"method {self.config.method} {what}"

    @property
    def words(self) -> str:
        """How its experts were chosen."""
        given = self.config.expert_cfg is not None
        return "experts that were given" if given else describe(self.config.select)


def find_run(path: Path) -> Run | None:
    """The run in a folder; None if the folder holds none.

    Raises:
        InputError: its files are damaged.
    """
    folder = RunFolder(path)
    if not os.path.lexists(folder.config):
        return None
    # Not `load_config`: a file that the run has read need not be there any more.
    config = strict_yaml.load(RunConfig, folder.config)
    experts = None
    if config.selects_experts and folder.expert_cfg.exists():
        experts = ExpertConfig.load(folder.expert_cfg)
    return Run(folder, config, experts)


@dataclass(frozen=True)
class Selection:
    """How the experts of a task are chosen.

    Attributes:
        method: whose scores count.
        words: the rule.
        note: how it relates to the run's own selection, as a sentence; empty without a run.
        top_p: the threshold, if there is one.
        rule: from scores to experts; None where the scores of the task alone do not say it.
        experts: chosen in each layer, best first; and what is trained besides.
    """

    method: ScoreMethod
    words: str
    note: str
    top_p: float | None
    rule: Rule | None
    experts: ExpertConfig

    def chosen(self, scores: ExpertScores) -> Bool[np.ndarray, "L E"]:
        """The experts, as a mask."""
        return _mask(self.experts, scores)


def find_selection(
    scores: ExpertScores, run: Run | None, method: ScoreMethod | None, top_p: float | None
) -> Selection:
    """The run's own selection, unless another one is asked for.

    Args:
        method: whose scores are to count; default: the run's, or `token`.
        top_p: the threshold; default: what the run did, or the paper's value for the method.

    Raises:
        InputError: the run's experts do not fit the model that the scores are of.
    """
    own = None if run is None else run.config.select
    wanted = method or (own.method if own is not None else "token")
    asked = top_p is not None or (own is not None and wanted != own.method)
    if run is not None and run.experts is not None and not asked:
        try:
            run.experts.validate(scores.layers, scores.num_experts)
        except InputError as error:
            raise InputError(f"{run.folder.expert_cfg}: {error}") from None
        rule, threshold = _own_rule(run, scores)
        note = f"These are the experts that the run trained ({run.words})."
        return Selection(wanted, run.words, note, threshold, rule, run.experts)
    if top_p is None:
        top_p = own.threshold if own is not None and not asked else None
        top_p = DEFAULT_TOP_P[wanted] if top_p is None else top_p
    rule = partial(chosen_mask, top_p=top_p)
    note = ""
    if run is not None and run.experts is not None:
        note = (
            f"These are experts that were asked for; the run itself trained "
            f"{run.experts.num_experts_selected} ({run.words})."
        )
    elif run is not None and run.config.selects_experts:
        note = "The run has not chosen its experts yet."
    elif run is not None:
        note = f"The run itself did not choose any: {run.trains_all}."
    words = f"{score_words(wanted)}, p = {top_p:g}"
    experts = ranked(scores, wanted, rule(round_scores(scores.of(wanted))))
    return Selection(wanted, words, note, top_p, rule, experts)


def _own_rule(run: Run, scores: ExpertScores) -> tuple[Rule | None, float | None]:
    """The rule and threshold of a run, if they lead from these scores to the experts it trained."""
    select, experts = run.config.select, run.experts
    assert experts is not None
    rule: Rule
    top_p = None
    if select.top_k is not None:
        rule = partial(top_k_mask, k=select.top_k)
    elif select.max_parameters is not None or select.max_bytes is not None:
        count = experts.num_experts_selected
        rule = partial(budget_mask, count=count, allocation=select.allocation)
    else:
        top_p = select.threshold
        assert top_p is not None
        rule = partial(chosen_mask, top_p=top_p)
    found = rule(round_scores(scores.of(select.method)))
    return (rule, top_p) if (found == _mask(experts, scores)).all() else (None, None)


def ranked(
    scores: ExpertScores, method: ScoreMethod, chosen: Bool[np.ndarray, "L E"]
) -> ExpertConfig:
    """A mask as experts, best first."""
    order = np.argsort(-round_scores(scores.of(method)), axis=1, kind="stable")
    experts = {
        layer: tuple(ids[mask[ids]].tolist())
        for layer, ids, mask in zip(scores.layers, order, chosen, strict=True)
    }
    return ExpertConfig(experts)


def _mask(experts: ExpertConfig, scores: ExpertScores) -> Bool[np.ndarray, "L E"]:
    mask = np.zeros((len(scores.layers), scores.num_experts), bool)
    for row, layer in zip(mask, scores.layers, strict=True):
        row[list(experts.experts.get(layer, ()))] = True
    return mask
