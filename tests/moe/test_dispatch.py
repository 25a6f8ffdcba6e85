"""Sorting rows by group and back, against plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax.errors import InputError
from esft_jax.moe.dispatch import combine, sort_by_group, take_rows

T, K, D, G = 9, 3, 4, 5
GROUPS = np.random.default_rng(0).integers(0, G + 1, (T, K)).astype(np.int32)
GROUPS[GROUPS == 2] = 3  # an empty group


def test_assignments_are_sorted_by_group():
    dispatch = jax.jit(sort_by_group, static_argnums=1)(jnp.asarray(GROUPS), G)
    flat = GROUPS.reshape(-1)
    np.testing.assert_array_equal(dispatch.order, np.argsort(flat, kind="stable"))
    np.testing.assert_array_equal(dispatch.order[dispatch.place], np.arange(T * K))
    # Assignments of nobody (group G) come last and are not counted.
    np.testing.assert_array_equal(dispatch.group_sizes, np.bincount(flat, minlength=G + 1)[:G])
    assert dispatch.group_sizes[2] == 0 and dispatch.group_sizes.sum() < T * K


def test_more_assignments_than_can_be_numbered_are_refused():
    groups = jax.ShapeDtypeStruct((2**26, 4), jnp.int32)
    jax.eval_shape(lambda groups: sort_by_group(groups, 15), groups)
    with pytest.raises(InputError, match="268435456 assignments of tokens to 16 experts at once"):
        jax.eval_shape(lambda groups: sort_by_group(groups, 16), groups)


def test_rows_and_gradients_are_those_of_plain_indexing():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(T, D)).astype(np.float32)
    scale = rng.normal(size=(T * K, D)).astype(np.float32)  # makes places tell apart
    cotangent = rng.normal(size=(T, D)).astype(np.float32)

    def there_and_back(take, back):
        def loss(x, scale):
            dispatch = sort_by_group(jnp.asarray(GROUPS), G)
            rows = take(x, dispatch)
            out = back(rows * scale, dispatch)
            return jnp.sum(out * cotangent), (rows, out)

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, scale)

    ours = there_and_back(take_rows, lambda y, d: combine(y, d, T))
    plain = there_and_back(
        lambda x, d: x[d.order // K], lambda y, d: y[jnp.argsort(d.order)].reshape(T, K, D).sum(1)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), ours, plain)
    order = np.argsort(GROUPS.reshape(-1), kind="stable")
    np.testing.assert_array_equal(ours[1][0], x[order // K])
