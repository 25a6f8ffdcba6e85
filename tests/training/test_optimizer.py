import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esft_jax.adapt.partition import FROZEN, TUNED
from esft_jax.config import OptimizerConfig
from esft_jax.training.optimizer import make_optimizer, make_schedule


def test_schedule_warms_up_then_stays() -> None:
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4), steps=100)
    assert [float(schedule(step)) for step in (0, 1, 2, 4, 50, 99)] == [0, 0.5, 1, 2, 2, 2]


def test_schedule_cosine_ends_at_its_fraction() -> None:
    config = OptimizerConfig(
        learning_rate=1.0, schedule="cosine", warmup_steps=10, final_lr_fraction=0.1
    )
    schedule = make_schedule(config, steps=110)
    np.testing.assert_allclose([schedule(10), schedule(60), schedule(110)], [1.0, 0.55, 0.1], 1e-6)


def _params() -> dict[str, nnx.State]:
    def state(**arrays: jax.Array) -> nnx.State:
        named = {name: nnx.Param(x, axes=(None,) * x.ndim) for name, x in arrays.items()}
        return nnx.State(named)

    tuned = state(weight=jnp.full((2, 2), 2.0), scale=jnp.full(2, 2.0))
    return {TUNED: tuned, FROZEN: state(weight=jnp.ones((100, 100)))}


def test_frozen_parameters_have_no_state_no_update_and_no_say_in_the_clip_norm() -> None:
    params = _params()
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.0, clip_norm=1.0)
    optimizer = make_optimizer(config, steps=10)
    state = optimizer.init(params)
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(state))
    assert sizes == [1, 1, 2, 2, 4, 4]  # two counters, two moments of `scale` and of `weight`
    grads = jax.tree.map(jnp.ones_like, params)
    updates, state = optimizer.update(grads, state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates[FROZEN]))
    # The clip norm is that of the 6 tuned entries; 10,000 frozen ones would shrink it 40-fold.
    (moments,) = (x for x in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(x))
    first = moments.mu[TUNED]["weight"][...]
    np.testing.assert_allclose(first, (1 - 0.9) / np.sqrt(6), rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [1.0, 100.0])
def test_clipping_is_that_of_optax(clip_norm: float) -> None:
    params = _params()
    grads = jax.tree.map(lambda x: jnp.linspace(-3.0, 4.0, x.size).reshape(x.shape), params)
    clipped, _ = optax.clip_by_global_norm(clip_norm).update(grads[TUNED], optax.EmptyState())
    optimizer = make_optimizer(OptimizerConfig(clip_norm=clip_norm), steps=10)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    (moments,) = (x for x in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(x))
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(ours, 0.1 * theirs, rtol=1e-5),
        moments.mu[TUNED],
        clipped,
    )


def _is_adam(x: object) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


@pytest.mark.parametrize(("name", "expected"), [("weight", 2.0 * (1 - 0.5 * 0.1)), ("scale", 2.0)])
def test_weight_decay_spares_norm_scales(name: str, expected: float) -> None:
    params = _params()
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.5, weight_decay=0.1), steps=10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    after = optax.apply_updates(params[TUNED], updates[TUNED])
    np.testing.assert_allclose(after[name][...], expected, rtol=1e-6)
