"""Against cases small enough to count by hand."""

from functools import partial

import numpy as np
import pytest

from esft_jax.reporting import analysis
from esft_jax.routing.log import RoutingLog
from esft_jax.routing.select import chosen_mask


def test_effective_experts_of_even_and_single_shares() -> None:
    shares = analysis.mass_shares(np.array([[2.0, 2, 2, 2], [5, 0, 0, 0], [1, 1, 0, 0]]))
    np.testing.assert_allclose(shares[:, 0], [0.25, 1, 0.5])
    for effective in analysis.effective_experts(shares):
        np.testing.assert_allclose(effective, [4, 1, 2])
    entropy, simpson = analysis.effective_experts(np.array([[0.5, 0.25, 0.25]]))
    np.testing.assert_allclose(entropy, 2**1.5)  # 1.5 bits
    np.testing.assert_allclose(simpson, 1 / 0.375)


def test_a_layer_without_gates_has_no_shares() -> None:
    np.testing.assert_array_equal(analysis.mass_shares(np.zeros((1, 3))), 0)


def test_top_k_mass_and_shared_top_k() -> None:
    one = np.array([[0.4, 0.3, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    other = np.array([[0.4, 0.1, 0.2, 0.3], [0.1, 0.2, 0.3, 0.4]])
    np.testing.assert_allclose(analysis.top_k_mass(one, 2), [0.7, 0.5])
    # The two best are 0, 1 and 0, 3; then 0, 1 (ties to the lower id) and 2, 3.
    np.testing.assert_array_equal(analysis.shared_top_k(one, other, 2), [1, 0])


def test_chance_is_what_random_choices_share() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.random((2, 20_000, 16))
    drawn = analysis.shared_top_k(one, other, 3).mean()
    assert drawn == pytest.approx(analysis.chance_shared(3, 16), abs=0.01)


def test_overlap_is_between_different_halves_of_each_pair() -> None:
    a, b, c = np.array([[3.0, 2, 1, 0]]), np.array([[3.0, 0, 2, 1]]), np.array([[0.0, 1, 3, 2]])
    # a b share one of their two best, b c one, a c none.
    found = analysis.overlap([(a, b), (b, c)], 2)
    np.testing.assert_allclose(found, [[1, (0 + 2) / 2], [1, 1]])


def test_alternate_halves() -> None:
    one, other = analysis.alternate_halves(np.arange(5.0).reshape(5, 1, 1))
    assert (one.item(), other.item()) == (0 + 2 + 4, 1 + 3)


def test_agreement_counts_common_experts() -> None:
    one = np.array([[True, True, False], [True, False, False]])
    other = np.array([[True, False, False], [False, False, True]])
    assert analysis.agreement(one, other) == pytest.approx(2 * 1 / (3 + 2))
    assert analysis.agreement(one, one) == 1


def test_tuned_experts_that_tokens_meet() -> None:
    ids = np.array([[[0, 1], [2, 3], [1, 2]]])
    log = RoutingLog((1,), 4, ids, np.ones(ids.shape), np.array([0, 3]))
    met = analysis.tuned_met(log, np.array([[False, True, True, False]]))
    np.testing.assert_array_equal(met, [[1, 1, 2]])


def test_words_are_ranked_by_their_mean() -> None:
    tokens = np.array([7, 7, 5, 5, 9])
    ids, counts, means = analysis.words(tokens, np.array([1.0, 2, 3, 1, 9]), minimum=2)
    assert ids.tolist() == [5, 7]
    assert counts.tolist() == [2, 2]
    assert means.tolist() == [2, 1.5]


def sequences(noise: float) -> np.ndarray:
    """Forty sequences of 64 tokens in one layer of 16 experts."""
    rng = np.random.default_rng(1)
    mean = np.arange(16, 0, -1.0) ** 2
    drawn = mean * np.exp(noise * rng.normal(size=(40, 1, 16)))
    return 64 * drawn / drawn.sum(axis=-1, keepdims=True)


RULE = partial(chosen_mask, top_p=0.5)


def test_equal_sequences_always_agree() -> None:
    sums, lengths = sequences(0), np.full(40, 64)
    sizes = analysis.sample_sizes(sums, lengths, RULE, 4, draws=20)
    assert [size.tokens for size in sizes] == [256, 512, 1024]  # 2560 tokens are two of 1024
    assert all(size.agreement == (1, 1, 1) and size.shared == (4, 4, 4) for size in sizes)
    choices = analysis.resampled_choices(sums, lengths, RULE, draws=20)
    assert (choices == chosen_mask(sums[0] / 64, 0.5)).all()


def test_noise_costs_agreement_and_tokens_bring_it_back() -> None:
    sums, lengths = sequences(1.5), np.full(40, 64)
    sizes = analysis.sample_sizes(sums, lengths, RULE, 4, draws=100)
    small, large = sizes[0].agreement, sizes[-1].agreement
    assert small[1] < large[1] < 1
    assert small[0] < small[1] < small[2]
    certainty = analysis.resampled_choices(sums, lengths, RULE, draws=200).mean(axis=0)
    assert ((certainty > 0.05) & (certainty < 0.95)).any()


def test_sequences_longer_than_a_size_leave_it_out() -> None:
    sums, lengths = 8 * sequences(0), np.full(40, 512)
    sizes = analysis.sample_sizes(sums, lengths, RULE, 4, draws=20)
    assert [size.tokens for size in sizes] == [512, 1024, 2048, 4096, 8192]
