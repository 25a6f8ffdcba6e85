"""Select the experts to train from their scores (ESFT eq. 8)."""

import numpy as np
from jaxtyping import Bool, Float, Int64

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
    order, taken = rank_and_take(round_scores(scores.of(method)), top_p)
    experts = {
        layer: tuple(order[row, taken[row]].tolist()) for row, layer in enumerate(scores.layers)
    }
    return ExpertConfig(experts, shared_experts, non_expert_modules)


def rank_and_take(
    scores: Float[np.ndarray, "*N E"], top_p: float
) -> tuple[Int64[np.ndarray, "*N E"], Bool[np.ndarray, "*N E"]]:
    """Experts in descending score, and which of these ranks are taken.

    Args:
        scores: with 4 decimals, or to be rounded so.
        top_p: sum to reach.
    """
    units = np.rint(scores * _UNIT).astype(np.int64)
    # 0.07 * 10000 is a hair above 700, which would add one expert too many.
    threshold = round(top_p * _UNIT, 6)
    order = np.argsort(-units, axis=-1, kind="stable")
    ranked = np.take_along_axis(units, order, axis=-1)
    return order, np.cumsum(ranked, axis=-1) - ranked < threshold


def chosen_mask(scores: Float[np.ndarray, "*N E"], top_p: float) -> Bool[np.ndarray, "*N E"]:
    """Which experts `select_experts` would choose."""
    order, taken = rank_and_take(scores, top_p)
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, taken, axis=-1)
    return mask
