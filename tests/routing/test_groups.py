import itertools

import numpy as np
import pytest

from esft_jax.routing.groups import count_together, group_experts
from esft_jax.routing.scores import load_scores
from esft_jax.routing.select import select_experts


def test_counts_are_those_of_all_pairs():
    rng = np.random.default_rng(0)
    ids = np.stack([rng.permutation(7)[:3] for _ in range(50)])
    expected = np.zeros((7, 7), np.int64)
    for token in ids:
        for i, j in itertools.product(token, token):
            expected[i, j] += 1
    np.testing.assert_array_equal(count_together(ids, 7), expected)
    assert count_together(ids, 9).shape == (9, 9)


def test_experts_of_the_same_tokens_come_together():
    # Tokens choose 0 and 3, 1 and 4, or 2 and 5, and seldom others.
    pairs = [(0, 3)] * 9 + [(4, 1)] * 8 + [(5, 2)] * 7 + [(0, 1), (2, 3)]
    together = count_together(np.array(pairs), 6)
    assert group_experts(together, 2).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert group_experts(together, 1).tolist() == [[i] for i in range(6)]
    assert group_experts(together, 6).tolist() == [list(range(6))]


def test_a_worked_example():
    # Cosines of rows 0 and 1: 20 / 29, of 2 and 3: 24 / 25, of others: 0.
    together = np.array([[5, 2, 0, 0], [2, 5, 0, 0], [0, 0, 4, 3], [0, 0, 3, 4]])
    assert group_experts(together, 2).tolist() == [[0, 1], [2, 3]]
    # 2 and 3 come first; nobody resembles them, so the lowest id joins.
    assert group_experts(np.pad(together, (0, 2)), 3).tolist() == [[0, 2, 3], [1, 4, 5]]


def test_greedy_by_brute_force():
    rng = np.random.default_rng(1)
    ids = np.stack([rng.permutation(12)[:4] for _ in range(60)])
    together = count_together(ids, 12)
    rows = together / np.linalg.norm(together, axis=1, keepdims=True)
    similar = np.round(rows @ rows.T, 9)
    for size in 2, 3, 4, 6:
        left, expected = list(range(12)), []
        while left:
            group = list(max(itertools.combinations(left, 2), key=lambda p: similar[p]))
            while len(group) < size:
                rest = [e for e in left if e not in group]
                group.append(max(rest, key=lambda e, g=group: round(similar[e, g].mean(), 9)))
            expected.append(sorted(group))
            left = [e for e in left if e not in group]
        assert group_experts(together, size).tolist() == sorted(expected)


def test_ties_go_to_lower_ids_and_unused_experts_are_left_for_last():
    same = np.full((6, 6), 2)
    assert group_experts(same, 2).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert group_experts(same, 3).tolist() == [[0, 1, 2], [3, 4, 5]]
    used = np.zeros((4, 4), int)
    used[1, 1] = used[3, 3] = used[1, 3] = used[3, 1] = 4
    assert group_experts(used, 2).tolist() == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="4 experts cannot be divided into groups of 3"):
        group_experts(used, 3)


@pytest.mark.parametrize("task", ["intent", "law"])
def test_coarser_groups_select_more_of_the_released_model(esft_reference, task):
    """The paper's finding (section 6.4): with coarser experts, more parameters are trained."""
    scores = load_scores(esft_reference / "results" / "expert_scores" / task)
    assert scores.together.shape == (26, 64, 64)
    tokens = scores.provenance["tokens"]
    # A token has six experts: six in its row each time.
    assert (scores.together.sum(axis=2) == 6 * np.diagonal(scores.together, 0, 1, 2)).all()
    np.testing.assert_allclose(
        np.diagonal(scores.together, 0, 1, 2) / (6 * tokens), scores.token, atol=1e-12
    )
    counts = []
    for size in 1, 2, 4:
        groups = np.stack([group_experts(table, size) for table in scores.together])
        chosen = select_experts(scores, "token", 0.2, groups=groups)
        assert all(len(ids) % size == 0 for ids in chosen.experts.values())
        counts.append(chosen.num_experts_selected)
    assert counts[0] == {"intent": 124, "law": 153}[task]
    assert counts[0] < counts[1] < counts[2]
