import numpy as np
import pytest

from esft_jax.data import pack
from esft_jax.data.pack import PackPlan


def plan_rows(lengths: list[int], sequence_length: int, seed: int) -> PackPlan:
    """Of documents that lie one behind the other."""
    found = np.array(lengths, np.int64)
    return pack.plan_rows(np.cumsum(found) - found, found, sequence_length, seed)


def rows(plan: PackPlan) -> list[list[tuple[int, int]]]:
    """(start, length) of the pieces in each row."""
    pieces = list(zip(plan.piece_starts.tolist(), plan.piece_lengths.tolist(), strict=True))
    bounds = zip(plan.row_starts[:-1], plan.row_starts[1:], strict=True)
    return [pieces[start:stop] for start, stop in bounds]


@pytest.mark.parametrize("seed", [0, 1])
def test_every_pair_exactly_once(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 70, 200).tolist()
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    plan = plan_rows(lengths, 16, seed)
    first_of_pair = [
        token for row in rows(plan) for start, n in row for token in range(start, start + n)
    ]
    # A pair starts at every token but the last of each document.
    expected = sorted(set(range(bounds[-1])) - set((bounds[1:] - 1).tolist()))
    assert sorted(first_of_pair) == expected
    assert all(0 < sum(n for _, n in row) <= 16 for row in rows(plan))


def test_long_document_is_split_and_its_tail_kept() -> None:
    plan = plan_rows([11], 4, seed=0)
    assert rows(plan) == [[(0, 4)], [(4, 4)], [(8, 2)]]


def test_best_fit_fills_rows() -> None:
    # 7 + 3, 6 + 4, 5 + 5 pairs: three full rows.
    plan = plan_rows([4, 5, 6, 6, 7, 8], 10, seed=0)
    assert [sum(n for _, n in row) for row in rows(plan)] == [10, 10, 10]


def test_waste_is_small() -> None:
    lengths = np.random.default_rng(0).integers(2, 200, 2000)
    plan = plan_rows(lengths.tolist(), 256, seed=0)
    assert len(plan) <= 1.01 * (lengths - 1).sum() / 256


def test_seed_decides_among_equal_lengths_only() -> None:
    first, again, other = (plan_rows([5] * 40, 16, seed) for seed in (0, 0, 1))
    assert rows(first) == rows(again)
    assert rows(first) != rows(other)
    assert len(first) == len(other)


def test_documents_without_a_pair_take_no_room() -> None:
    assert len(plan_rows([1, 1], 8, seed=0)) == 0
    assert rows(plan_rows([1, 3, 1], 8, seed=0)) == [[(1, 2)]]
