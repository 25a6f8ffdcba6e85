"""Groups of a layer's experts that serve the same tokens, to be selected as a whole.

This stands in for a model with coarser experts (arXiv 2407.01906, section 6.4).

Letters: T tokens, K experts per token, E experts of a layer, G groups of N experts.
"""

import numpy as np
from jaxtyping import Float64, Int64, Integer

# Cosines that differ by rounding alone are ties, on every machine.
_DECIMALS = 10


def count_together(
    expert_ids: Integer[np.ndarray, "T K"], num_experts: int
) -> Int64[np.ndarray, "E E"]:
    """How many tokens chose both of two experts; on the diagonal, how many chose one."""
    chosen = np.zeros((len(expert_ids), num_experts), np.float64)
    np.put_along_axis(chosen, expert_ids, 1.0, axis=1)
    return np.rint(chosen.T @ chosen).astype(np.int64)


def group_experts(together: Int64[np.ndarray, "E E"], size: int) -> Int64[np.ndarray, "G N"]:
    """Divide a layer's experts into groups of `size`, greedily by similarity.

    Two experts are as similar as the cosine of their rows of `together`: they are chosen beside
    the same experts, each other included. The two most similar ones that are left begin a group;
    whoever is most similar to its members on average joins, until it is full. Ties go to lower
    ids. Experts that no token chose resemble no other and are left for the last groups.

    Returns:
        Members of each group, ascending; groups by their first member.
    """
    count = len(together)
    if size < 1 or count % size:
        raise ValueError(f"{count} experts cannot be divided into groups of {size}")
    similar = _cosines(together)
    left = np.ones(count, bool)
    groups = []
    while left.any():
        pairs = np.where(left[:, None] & left[None, :], similar, -1.0)
        np.fill_diagonal(pairs, -1.0)
        first = int(pairs.max(axis=1).argmax())
        group = [first] if size > 1 else [int(left.argmax())]
        left[group[0]] = False
        while len(group) < size:
            mean = np.round(similar[group].mean(axis=0), _DECIMALS)
            joins = int(np.where(left, mean, -1.0).argmax())
            group.append(joins)
            left[joins] = False
        groups.append(sorted(group))
    return np.array(sorted(groups), dtype=np.int64)


def _cosines(together: Int64[np.ndarray, "E E"]) -> Float64[np.ndarray, "E E"]:
    rows = together.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return np.round(rows @ rows.T, _DECIMALS)
