"""Stochastic rounding: right on average, and the same wherever an element lies."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esft_jax.adapt.partition import TUNED
from esft_jax.adapt.slots import TunedLayout
from esft_jax.adapt.tuned import TunedParam
from esft_jax.model.params import Role
from esft_jax.sharding import make_mesh, param_shardings
from esft_jax.training.hashing import mixed
from esft_jax.training.rounding import Rounding, round_stochastically
from esft_jax.training.state import init_state, tuned_only
from esft_jax.training.step import apply_gradients

BFLOAT16_BITS = 8  # significant ones


def narrowed(value: jax.Array, seed: int = 1, step: int = 2, **options) -> np.ndarray:
    """A matrix in bfloat16, as float32."""
    param = nnx.Param(value, axes=("embed", None), role=Role.HEAD)
    before = {"x": param.replace(value.astype(jnp.bfloat16))}
    rounding = Rounding.of(seed, jnp.array(step, jnp.int32), options.get("rows"))
    found = rounding.narrowed({"x": param}, before)["x"].get_value()
    assert found.dtype == jnp.bfloat16
    return np.asarray(found.astype(jnp.float32))


def neighbours(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The bfloat16 numbers next to float32 ones, that towards 0 first."""
    words = value.view(np.uint32) & np.uint32(0xFFFF0000)
    return words.view(np.float32), (words + np.uint32(0x10000)).view(np.float32)


def test_it_is_one_of_the_neighbours_and_right_on_average() -> None:
    values = np.concatenate([np.linspace(-3, 3, 101), [1e-30, -1e-38, 0.0, 1.5, 3e38]])
    values = values.astype(np.float32)
    draws = 8192
    bits = mixed(jnp.arange(draws * len(values), dtype=jnp.uint32)).reshape(draws, -1)
    found = round_stochastically(jnp.broadcast_to(values, bits.shape), bits)
    found = np.asarray(found.astype(jnp.float32)).astype(np.float64)
    low, high = neighbours(values)
    assert ((found == low) | (found == high)).all()
    exact = values == low
    assert exact.sum() > 2 and (found[:, exact] == values[exact]).all()
    # Within five standard deviations, of which that of a draw is at most half a step.
    step = np.abs(high.astype(np.float64) - low)
    assert (np.abs(found.mean(0) - values) <= 5 * step / 2 / draws**0.5).all()


def test_what_is_not_finite_stays_so() -> None:
    values = jnp.array([jnp.inf, -jnp.inf, jnp.nan])
    for bits in 0, 2**32 - 1:
        found = round_stochastically(values, jnp.full(3, bits, jnp.uint32))
        np.testing.assert_array_equal(found.astype(jnp.float32), values)


def test_bits_depend_on_seed_step_and_position() -> None:
    value = jnp.full((64, 64), 1 + 2.0**-BFLOAT16_BITS)  # half-way between two
    first = narrowed(value)
    np.testing.assert_array_equal(first, narrowed(value))
    up = first > 1
    assert abs(up.mean() - 0.5) < 5 * 0.5 / 64
    for other in narrowed(value, seed=2), narrowed(value, step=3), first.T, np.roll(first, 1, 0):
        assert abs((first == other).mean() - 0.5) < 5 * 0.5 / 64


@pytest.mark.parametrize(("data", "expert"), [(8, 1), (2, 4)])
def test_the_number_of_devices_does_not_matter(data: int, expert: int) -> None:
    value = jnp.asarray(np.random.default_rng(0).normal(size=(32, 24)), jnp.float32)
    param = nnx.Param(value, axes=("embed", None), role=Role.HEAD)
    place = param_shardings(param, make_mesh(data, expert)).get_value()
    np.testing.assert_array_equal(narrowed(jax.device_put(value, place)), narrowed(value))


def test_a_row_of_a_bank_is_rounded_by_what_it_holds() -> None:
    selected = ((0, 1, 2), (), (1, 6, 7), (3,))
    found = {}
    for shards in 1, 2, 4:
        layout = TunedLayout.place(selected, 8, shards)
        param = TunedParam(
            jnp.full((len(layout.held), 16, 8), 1 + 2.0**-BFLOAT16_BITS),
            axes=("experts", None, None),
            role=Role.ROUTED_EXPERT,
        )
        before = param.replace(param.get_value().astype(jnp.bfloat16))
        after = Rounding.of(0, jnp.array(1, jnp.int32), layout.held).narrowed(param, before)
        by_row = np.asarray(after.get_value().astype(jnp.float32))
        found[shards] = {(layer, e): by_row[row] for layer, e, row in layout.rows()}
    for rows in found.values():
        assert rows.keys() == found[1].keys()
        for key, row in rows.items():
            np.testing.assert_array_equal(row, found[1][key])
    assert len({row.tobytes() for row in found[1].values()}) == 7


def test_a_second_moment_moves_that_would_not_if_rounded_to_the_nearest() -> None:
    """With a decay of 0.999, in 500 updates: from 1 towards squared gradients of 0.25."""
    decay, updates = 0.999, 500
    tuned = nnx.State({"w": nnx.Param(jnp.zeros((64, 64)), axes=("embed", None), role=Role.HEAD)})
    frozen = nnx.State({})
    optimizer = tuned_only(optax.scale_by_adam(b2=decay))
    state = init_state(optimizer, tuned, frozen, jnp.bfloat16)
    adam = state.opt_state.inner_states[TUNED].inner_state
    assert adam.nu[TUNED]["w"].get_value().dtype == jnp.bfloat16
    ones = jax.tree.map(jnp.ones_like, adam.nu)
    opt_state = jax.tree.map(lambda x: x, state.opt_state)
    opt_state.inner_states[TUNED] = opt_state.inner_states[TUNED]._replace(
        inner_state=adam._replace(nu=ones)
    )
    grads = jax.tree.map(lambda x: jnp.full_like(x, 0.5), tuned)

    @jax.jit
    def run(opt_state: optax.OptState) -> optax.OptState:
        def one(step: jax.Array, opt_state: optax.OptState) -> optax.OptState:
            rounding = Rounding.of(0, step, None)
            return apply_gradients(optimizer, grads, frozen, rounding, tuned, opt_state)[1]

        return jax.lax.fori_loop(0, updates, one, opt_state)

    moments = run(opt_state).inner_states[TUNED].inner_state.nu[TUNED]["w"].get_value()
    expected = 0.25 + 0.75 * decay**updates
    nearest = jnp.array(decay + (1 - decay) * 0.25).astype(jnp.bfloat16)
    assert nearest == 1  # where it would stay
    # The mean over 4096 elements; each is a walk of 500 draws with a step of at most 2^-8.
    found = np.asarray(moments.astype(jnp.float32))
    deviation = 2.0**-BFLOAT16_BITS / 2 * updates**0.5
    assert abs(found.mean() - expected) < 5 * deviation / found.size**0.5
    assert found.std() < deviation
