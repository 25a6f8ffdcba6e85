"""The import hook of `conftest.py`: annotations are checked in every call."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from esft_jax.moe.dispatch import combine, sort_by_group
from esft_jax.moe.grouped_matmul import Bank


def test_types_and_shapes_are_checked():
    dispatch = sort_by_group(jnp.zeros((4, 2), jnp.int32), 3)
    rows = jnp.ones((8, 5))
    assert combine(rows, dispatch, 4).shape == (4, 5)
    for other in (np.ones((8, 5), np.float32), jnp.ones((8, 5), jnp.int32), rows[:, 0], rows[:7]):
        with pytest.raises(TypeCheckError, match="combine"):
            combine(other, dispatch, 4)


def test_pytrees_are_rebuilt_with_other_leaves():
    assert Bank(None, 0, 3).matrices is None
