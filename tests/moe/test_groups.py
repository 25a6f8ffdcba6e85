"""Which rows belong to which group, whatever is asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax.moe.grouped_matmul.groups import Groups

HUGE, ROWS = 2**31 - 1, 10
# Sizes and starts that are asked for, and what they count as.
ASKED = {
    "as they are": (([3, 2, 4], [0, 8, 3]), ([3, 2, 4], [0, 8, 3])),
    "past the rows": (([4, 4, 4], [4, 8, 99]), ([4, 2, 0], [4, 8, 10])),
    "before the rows": (([2, 4, 4], [7, -5, -HUGE]), ([2, 4, 0], [7, 0, 4])),
    "ends beyond int32": (([3, HUGE, HUGE], [0, 5, HUGE]), ([3, 5, 0], [0, 5, 10])),
    "inside of another": (([2, 9, 3], [2, 1, 6]), ([0, 9, 0], [10, 1, 10])),
    "the same rows": (([3, 3, 4], [2, 2, 2]), ([3, 0, 1], [2, 5, 5])),
    "none in a group": (([0, 3, -1], [4, 3, 5]), ([0, 3, 0], [4, 3, 5])),
}


@pytest.mark.parametrize(("asked", "counted"), ASKED.values(), ids=ASKED)
def test_groups_keep_to_rows_of_their_own(asked, counted):
    groups = Groups.within(*(jnp.array(numbers, jnp.int32) for numbers in asked), ROWS)
    assert (groups.sizes.tolist(), groups.starts.tolist()) == counted


def test_any_numbers_make_disjoint_groups_and_padding():
    rng = np.random.default_rng(0)
    stretches = jax.jit(lambda *a: ((g := Groups.within(*a, ROWS)), g.stretches(ROWS)))
    for _ in range(300):
        sizes, starts = rng.integers(-3, 8, 4), rng.integers(-3, 14, 4)
        groups, (lengths, ends, of_group) = stretches(sizes, starts)
        owner = np.full(ROWS, 4)
        begins = np.maximum(starts, 0)
        for group in np.argsort(begins, kind="stable"):
            rows = np.arange(begins[group], min(begins[group] + sizes[group], ROWS))
            owner[rows[owner[rows] == 4]] = group
        found = np.full(ROWS, 4)
        for group in range(4):
            first = groups.starts[group]
            found[first : first + groups.sizes[group]] = group
        np.testing.assert_array_equal(found, owner)
        assert (lengths >= 0).all() and ends[-1] == ROWS
        np.testing.assert_array_equal(np.repeat(of_group, lengths), owner)
