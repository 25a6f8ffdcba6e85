"""Select the experts to train from their scores (ESFT eq. 8), and selections to compare with.

Letters: L MoE layers, E experts of a layer, G groups of N experts.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int64, Num

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.parts import Part
from esft_jax.errors import InputError
from esft_jax.routing.scores import SCORE_METHODS, ExpertScores, round_scores
from esft_jax.selection_config import Allocation, ScoreMethod

_UNIT = 10_000  # released scores have 4 decimals: whole units make the sums exact


def select_experts(
    scores: ExpertScores,
    method: ScoreMethod,
    top_p: float | None = None,
    also: Iterable[Part] = (),
    *,
    top_k: int | None = None,
    max_experts: int | None = None,
    allocation: Allocation = "global",
    groups: Int64[np.ndarray, "L G N"] | None = None,
) -> ExpertConfig:
    """Take the best experts of each layer, or of the whole model, by one of three rules.

    `top_p`: in each layer, until their scores reach it together. As in the released
    configurations, an expert is added while the sum before it is below `top_p`. For the gate score
    it is absolute gate mass: a layer whose top-K gates never reach it is selected whole.
    `top_k`: as many in each layer.
    `max_experts`: this many in all layers together. With the `allocation` `global` the best of all:
    every layer routes the same tokens, so by token scores no other choice of as many experts serves
    more of them; a layer may get none. With `uniform` as many in each layer, with `top_p` those of
    the largest p for which they are no more.

    Scores count with 4 decimals, in descending order, ties to the lower layer, then the lower id.

    Args:
        scores: Scores of the task.
        method: Which score to use.
        top_p: Sum to reach, in (0, 1].
        also: Copied into the result.
        top_k: Experts per layer.
        max_experts: Experts in all.
        allocation: Of `max_experts` among layers.
        groups: Experts that are taken together, all groups as large, with the sum of their scores.
            The three rules take whole groups, with no more experts than the last two say.

    Raises:
        InputError: Unknown method, no scores by it, or a rule that is out of range, or not exactly
            one rule; or fewer experts than an allocation needs, at least one for each layer.
    """
    if method not in SCORE_METHODS:
        raise InputError(f"method: {method!r} is unknown; expected {' or '.join(SCORE_METHODS)}")
    rules = {"top_p": top_p, "top_k": top_k, "max_experts": max_experts}
    if sum(rule is not None for rule in rules.values()) != 1:
        raise InputError(f"{', '.join(rules)}: expected exactly one of them")
    units = np.rint(round_scores(scores.of(method)) * _UNIT).astype(np.int64)
    if groups is None:
        groups = np.broadcast_to(np.arange(scores.num_experts)[:, None], (*units.shape, 1))
    size = groups.shape[2]
    if top_k is not None and top_k < size:
        raise InputError(f"top_k: {top_k} is out of range; expected at least {size}")
    grouped = np.take_along_axis(units[:, None], groups, axis=2).sum(axis=2)
    if top_p is not None:
        if not 0 < top_p <= 1:  # also false for NaN
            raise InputError(f"top_p: {top_p} is out of range; expected a number in (0, 1]")
        taken = chosen_mask(grouped / _UNIT, top_p)
    elif top_k is not None:
        taken = top_k_mask(grouped, top_k // size)
    else:
        assert max_experts is not None
        least = size if allocation == "global" else size * len(scores.layers)
        if max_experts < least:
            raise InputError(
                f"max_experts: {max_experts} is out of range; expected at least {least}"
            )
        taken = budget_mask(grouped / _UNIT, max_experts // size, allocation)
    experts = {}
    for layer, row, members, chosen in zip(scores.layers, units, groups, taken, strict=True):
        ids = np.sort(members[chosen].reshape(-1))
        experts[layer] = tuple(ids[np.argsort(-row[ids], kind="stable")].tolist())
    return ExpertConfig(experts, tuple(also))


def rank_and_take(
    scores: Float[np.ndarray, "*N E"], top_p: float
) -> tuple[Int64[np.ndarray, "*N E"], Bool[np.ndarray, "*N E"]]:
    """Experts in descending score, and which of these ranks are taken.

    Args:
        scores: with 4 decimals, or to be rounded so.
        top_p: sum to reach.
    """
    order, before = _sums_before(scores)
    # 0.07 * 10000 is a hair above 700, which would add one expert too many.
    return order, before < round(top_p * _UNIT, 6)


def _sums_before(
    scores: Float[np.ndarray, "*N E"],
) -> tuple[Int64[np.ndarray, "*N E"], Int64[np.ndarray, "*N E"]]:
    """Experts in descending score, and the sum of the scores before each, in whole units."""
    units = np.rint(scores * _UNIT).astype(np.int64)
    order = np.argsort(-units, axis=-1, kind="stable")
    ranked = np.take_along_axis(units, order, axis=-1)
    return order, np.cumsum(ranked, axis=-1) - ranked


def chosen_mask(scores: Float[np.ndarray, "*N E"], top_p: float) -> Bool[np.ndarray, "*N E"]:
    """Which experts `select_experts` would choose."""
    order, taken = rank_and_take(scores, top_p)
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, taken, axis=-1)
    return mask


def top_k_mask(scores: Num[np.ndarray, "*N E"], k: int) -> Bool[np.ndarray, "*N E"]:
    """The k best of each layer."""
    order = np.argsort(-scores, axis=-1, kind="stable")
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order[..., :k], True, axis=-1)
    return mask


def best_mask(scores: Num[np.ndarray, "*N L E"], count: int) -> Bool[np.ndarray, "*N L E"]:
    """The best of all layers together."""
    flat = scores.reshape(*scores.shape[:-2], -1)
    return top_k_mask(flat, count).reshape(scores.shape)


def budget_mask(
    scores: Float[np.ndarray, "*N L E"], count: int, allocation: Allocation
) -> Bool[np.ndarray, "*N L E"]:
    """At most this many of all layers together, as an allocation divides them.

    Args:
        scores: with 4 decimals, or to be rounded so.
    """
    if allocation == "global":
        return best_mask(scores, count)
    layers, experts = scores.shape[-2:]
    if allocation == "uniform":
        return top_k_mask(scores, min(count // layers, experts))
    # An expert is taken if the sum before it is less than p. Of all these sums, p is the one that
    # `count` others do not exceed: then no more than these are less.
    order, before = _sums_before(scores)
    every = np.sort(before.reshape(*scores.shape[:-2], -1), axis=-1)
    limit = every[..., count, None, None] if count < layers * experts else np.inf
    mask = np.zeros(scores.shape, bool)
    np.put_along_axis(mask, order, before < limit, axis=-1)
    return mask


def random_experts(
    like: ExpertConfig,
    seed: int,
    num_experts: int,
    groups: Mapping[int, Int64[np.ndarray, "G N"]] | None = None,
) -> ExpertConfig:
    """As many experts of each layer as another selection has, drawn at random from all of them.

    The paper's control: what counts is then how many experts are trained, not which.

    Args:
        num_experts: Routed experts per layer.
        groups: By layer; then whole groups are drawn.
    """
    generator = np.random.default_rng(seed)
    experts = {}
    for layer, ids in like.experts.items():
        members = np.arange(num_experts)[:, None] if groups is None else groups[layer]
        drawn = generator.choice(len(members), len(ids) // members.shape[1], replace=False)
        experts[layer] = tuple(np.sort(members[drawn].reshape(-1)).tolist())
    return ExpertConfig(experts, like.also)


def combine_experts(
    selections: Sequence[ExpertConfig], how: Literal["union", "intersection"]
) -> ExpertConfig:
    """Experts that any, or that every one of several tasks selects.

    Ids keep the order of the first selection that has them; other parts are trained if any
    selection trains them.
    """
    layers = sorted({layer for selection in selections for layer in selection.experts})
    experts = {}
    for layer in layers:
        each = [selection.experts.get(layer, ()) for selection in selections]
        counts = Counter(expert for one in each for expert in one)
        least = 1 if how == "union" else len(each)
        experts[layer] = tuple(expert for expert, count in counts.items() if count >= least)
    return ExpertConfig(experts, tuple(part for each in selections for part in each.also))
