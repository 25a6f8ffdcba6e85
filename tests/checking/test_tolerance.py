"""The measure of errors: one wrong tile is seen, roundings are not."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax.checking.tolerance import BLOCK, error, tolerance

BOUND = tolerance(jnp.bfloat16, 4096)


@pytest.fixture
def exact():
    return np.random.default_rng(0).normal(size=(3, 130, 70))


def rounded(exact):
    return np.array(jnp.asarray(exact, jnp.bfloat16).astype(jnp.float32))


def test_roundings_are_within_the_tolerance(exact):
    assert 0 < error(rounded(exact), exact) < BOUND / 2


@pytest.mark.parametrize("start", [(0, 0), (64, 32), (114, 54)])  # the last tile is at the edges
def test_one_percent_in_one_tile_is_not(exact, start):
    found = rounded(exact)
    tile = (1, *(slice(begin, begin + BLOCK) for begin in start))
    found[tile] *= 1.01
    assert BOUND < error(found, exact) < 1.1e-2


def test_small_numbers_are_measured_against_the_others(exact):
    exact[0, :BLOCK, :BLOCK] = 0
    found = exact.copy()
    found[0, :BLOCK, :BLOCK] = 1e-3
    assert error(found, exact) == pytest.approx(8e-3, rel=0.1)
    assert error(np.zeros(5), np.zeros(5)) == 0


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_is_not_finite_is_wrong(exact, number):
    found = exact.copy()
    found[2, 5, 7] = number
    assert error(found, exact) == math.inf


def test_it_grows_with_roundings_and_with_sums():
    assert tolerance(jnp.float32, 64) < tolerance(jnp.float32, 6400) < 1e-5
    assert tolerance(jnp.bfloat16, 64) < 1e-2
