"""Questions to the routing of a task, as functions of arrays.

L layers, E experts per layer, K experts per token, N sequences, T tokens.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int, Int64

from esft_jax.reporting.selection import Rule
from esft_jax.routing.log import RoutingLog

_OFF_SIZE = 0.25  # of a size: samples are whole sequences, which may miss it by that share


def mass_shares(gate: Float[np.ndarray, "*N E"]) -> Float64[np.ndarray, "*N E"]:
    """Each expert's share of its layer's gate mass; 0 in a layer without any."""
    total = gate.sum(axis=-1, keepdims=True)
    return np.divide(gate, total, out=np.zeros_like(gate, np.float64), where=total > 0)


def effective_experts(
    shares: Float[np.ndarray, "*N E"],
) -> tuple[Float64[np.ndarray, "*N"], Float64[np.ndarray, "*N"]]:
    """The effective number of experts: how many with equal shares would be spread as widely.

    Two definitions: the exponential of the entropy, `exp(-Σ s ln s)`, and the inverse Simpson
    index, `1 / Σ s²`, which counts small shares less.
    """
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return np.exp(-(shares * logs).sum(axis=-1)), 1 / np.square(shares).sum(axis=-1)


def top_k_mass(shares: Float[np.ndarray, "*N E"], k: int) -> Float64[np.ndarray, "*N"]:
    """Sum of the k largest shares."""
    return np.sort(shares, axis=-1)[..., -k:].sum(axis=-1)


def shared_top_k(
    one: Float[np.ndarray, "*N E"], other: Float[np.ndarray, "*N E"], k: int
) -> Int64[np.ndarray, "*N"]:
    """How many experts are among the k best of both; ties to the lower id."""

    def best(scores: np.ndarray) -> np.ndarray:
        order = np.argsort(-scores, axis=-1, kind="stable")[..., :k]
        mask = np.zeros(scores.shape, bool)
        np.put_along_axis(mask, order, True, axis=-1)
        return mask

    return (best(one) & best(other)).sum(axis=-1)


def chance_shared(k: int, num_experts: int) -> float:
    """Expected `shared_top_k` of two draws of k experts (the mean of a hypergeometric law)."""
    return k * k / num_experts


def overlap(
    halves: list[tuple[Float[np.ndarray, "L E"], Float[np.ndarray, "L E"]]], k: int
) -> Float64[np.ndarray, "Q Q"]:
    """Mean over layers of the top-k experts that two independent samples share.

    Args:
        halves: of each of Q tasks, the scores of two samples without a common sequence.

    Returns:
        Row i, column j: the first half of one task against the second half of the other, both ways.
    """
    one_way = np.array([[shared_top_k(a, b, k).mean() for _, b in halves] for a, _ in halves])
    return (one_way + one_way.T) / 2


def alternate_halves(
    sums: Float[np.ndarray, "N L E"],
) -> tuple[Float[np.ndarray, "L E"], Float[np.ndarray, "L E"]]:
    """Two independent samples: every other sequence, and those between them."""
    return sums[::2].sum(axis=0), sums[1::2].sum(axis=0)


def tuned_met(log: RoutingLog, chosen: Bool[np.ndarray, "L E"]) -> Int[np.ndarray, "L T"]:
    """How many of its K experts are chosen ones, for each token and layer."""
    return np.stack(
        [mask[ids].sum(axis=-1) for mask, ids in zip(chosen, log.expert_ids, strict=True)]
    )


def agreement(
    one: Bool[np.ndarray, "*N L E"], other: Bool[np.ndarray, "*N L E"]
) -> Float64[np.ndarray, "*N"]:
    """Of the experts that one choice takes, the share that the other takes too.

    Averaged both ways by size: the Dice coefficient, `2 |A ∩ B| / (|A| + |B|)`.
    """
    common = (one & other).sum(axis=(-2, -1))
    return 2 * common / (one.sum(axis=(-2, -1)) + other.sum(axis=(-2, -1)))


@dataclass(frozen=True)
class SampleSize:
    """Two independent samples of `tokens` tokens, drawn again and again.

    Attributes:
        tokens: of each sample; whole sequences make that up to a quarter.
        agreement: 5th, 50th and 95th percentile of `agreement` of the choices.
        shared: the same percentiles of the top-K experts that both have, mean over layers.
    """

    tokens: int
    agreement: tuple[float, float, float]
    shared: tuple[float, float, float]


def sample_sizes(
    sums: Float[np.ndarray, "N L E"],
    lengths: Int[np.ndarray, " N"],
    rule: Rule,
    k: int,
    *,
    draws: int = 200,
    seed: int = 0,
) -> list[SampleSize]:
    """How well two samples agree, at 2^8, 2^9, ... 2^17 tokens, as far as two fit (Fig. 8).

    Args:
        sums: scores of each sequence, summed over its tokens.
        lengths: tokens of each sequence.
        rule: from scores to experts.
        draws: pairs of samples without a common sequence, for each size.
    """
    rng = np.random.default_rng(seed)
    found = []
    for tokens in (2**power for power in range(8, 18)):
        if 2 * tokens > lengths.sum():
            break
        agreements, shared = [], []
        for _ in range(draws):
            order = rng.permutation(len(lengths))
            ends = np.cumsum(lengths[order])
            one = 1 + int(np.abs(ends - tokens).argmin())
            two = 1 + int(np.abs(ends - ends[one - 1] - tokens).argmin())
            parts = order[:one], order[one:two]
            if any(abs(lengths[part].sum() / tokens - 1) > _OFF_SIZE for part in parts):
                continue
            first, second = (sums[part].sum(axis=0) / lengths[part].sum() for part in parts)
            agreements.append(agreement(rule(first), rule(second)))
            shared.append(shared_top_k(first, second, k).mean())
        if len(agreements) >= draws / 2:
            found.append(SampleSize(tokens, _percentiles(agreements), _percentiles(shared)))
    return found


def _percentiles(values: list) -> tuple[float, float, float]:
    low, middle, high = np.percentile(values, (5, 50, 95)).tolist()
    return low, middle, high


def resampled_choices(
    sums: Float[np.ndarray, "N L E"],
    lengths: Int[np.ndarray, " N"],
    rule: Rule,
    *,
    draws: int = 200,
    seed: int = 0,
) -> Bool[np.ndarray, "R L E"]:
    """The bootstrap: choices from as many sequences, drawn with replacement."""
    size, *shape = sums.shape
    times = np.random.default_rng(seed).multinomial(size, np.full(size, 1 / size), draws)
    scores = (times @ sums.reshape(size, -1)) / (times @ lengths)[:, None]
    return rule(scores.reshape(draws, *shape))


def words(
    tokens: Int[np.ndarray, " T"], met: Float[np.ndarray, " T"], minimum: int
) -> tuple[Int[np.ndarray, " V"], Int64[np.ndarray, " V"], Float64[np.ndarray, " V"]]:
    """Vocabulary ids, how often they come, and the mean of `met` over their places; highest first.

    Args:
        minimum: leave out what comes less often.
    """
    ids, index, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    means = np.bincount(index, met) / counts
    order = np.argsort(-means, kind="stable")
    order = order[counts[order] >= minimum]
    return ids[order], counts[order], means[order]
