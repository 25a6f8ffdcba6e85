"""Select the experts to train from their scores (ESFT eq. 8)."""

import numpy as np

from esft_jax.errors import InputError
from esft_jax.experts.expert_config import ExpertConfig
from esft_jax.experts.scores import SCORE_METHODS, ExpertScores, ScoreMethod, round_scores

DEFAULT_TOP_P: dict[ScoreMethod, float] = {"token": 0.2, "gate": 0.1}  # the paper's choice

_UNIT = 10_000  # released scores have 4 decimals: whole units make the sums exact


def select_experts(
    scores: ExpertScores,
    method: ScoreMethod,
    top_p: float,
    shared_experts: bool = False,
    non_expert_modules: bool = False,
) -> ExpertConfig:
    """Take each layer's best experts until their scores reach `top_p` together.

    As in the released configurations, scores count with 4 decimals, in descending order, ties to
    the lower id, and an expert is added while the sum before it is below `top_p`. For the gate
    score `top_p` is absolute gate mass: a layer whose top-K gates never reach it is selected whole.

    Args:
        scores: Scores of the task.
        method: Which score to use.
        top_p: Sum to reach, in (0, 1].
        shared_experts: Copied into the result.
        non_expert_modules: Copied into the result.

    Raises:
        InputError: Unknown method, or `top_p` out of range.
    """
    if method not in SCORE_METHODS:
        raise InputError(f"method: {method!r} is unknown; expected {' or '.join(SCORE_METHODS)}")
    if not 0 < top_p <= 1:  # also false for NaN
        raise InputError(f"top_p: {top_p} is out of range; expected a number in (0, 1]")
    units = np.rint(round_scores(scores.of(method)) * _UNIT).astype(np.int64)
    # 0.07 * 10000 is a hair above 700, which would add one expert too many.
    threshold = round(top_p * _UNIT, 6)
    experts = {}
    for layer, row in zip(scores.layers, units, strict=True):
        order = np.argsort(-row, kind="stable")
        covered_before = np.cumsum(row[order]) - row[order]
        experts[layer] = tuple(order[covered_before < threshold].tolist())
    return ExpertConfig(experts, shared_experts, non_expert_modules)
