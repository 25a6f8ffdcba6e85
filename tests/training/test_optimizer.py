import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from esft_jax.adapt.partition import FROZEN, TUNED
from esft_jax.errors import InputError
from esft_jax.model.params import Role
from esft_jax.optimizer_config import OptimizerConfig
from esft_jax.training.optimizer import changed_rate, make_optimizer, make_schedule


def test_schedule_warms_up_then_stays() -> None:
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, warmup_steps=4), steps=100)
    assert [float(schedule(step)) for step in (0, 1, 2, 4, 50, 99)] == [0, 0.5, 1, 2, 2, 2]


def test_schedule_cosine_ends_at_its_fraction() -> None:
    config = OptimizerConfig(
        learning_rate=1.0, schedule="cosine", warmup_steps=10, final_lr_fraction=0.1
    )
    schedule = make_schedule(config, steps=110)
    np.testing.assert_allclose([schedule(10), schedule(60), schedule(110)], [1.0, 0.55, 0.1], 1e-6)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        # At its begin, in and after the warm-up, in the middle of the rest, before and at its end.
        ({"schedule": "linear", "warmup_steps": 20}, [0, 0.5, 1, 0.55, 0.1 + 0.9 / 80, 0.1]),
        ({"schedule": "wsd", "warmup_share": 0.2}, [0, 0.5, 1, 1, 0.1 + 0.9 / 20, 0.1]),
        (
            {"schedule": "wsd", "warmup_steps": 20, "decay_share": 0.8, "final_lr_fraction": 0},
            [0, 0.5, 1, 0.5, 1 / 80, 0],
        ),
        (
            {"schedule": "inverse_sqrt", "warmup_share": 0.2},
            [0, 0.5, 1, 3**-0.5, (20 / 99) ** 0.5, 5**-0.5],
        ),
    ],
)
def test_schedules(config: dict, expected: list[float]) -> None:
    schedule = make_schedule(OptimizerConfig(learning_rate=2.0, **config), steps=100)
    rates = [float(schedule(update)) / 2 for update in (0, 10, 20, 60, 99, 100)]
    np.testing.assert_allclose(rates, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ({"schedule": "constant", "warmup_share": 0.1}, 200, "the warm-up is over a share of them"),
        ({"schedule": "linear"}, 200, "the linear schedule is over all of them"),
        ({"schedule": "wsd"}, 200, None),  # before its decay, and after its warm-up
        ({"schedule": "wsd"}, 61, "the wsd schedule is over all of them"),
    ],
)
def test_what_more_steps_do_to_the_rate(before: dict, after: int, said: str | None) -> None:
    found = changed_rate(OptimizerConfig(**before), 100, after, 10 if after == 200 else 60)
    assert said in found if said else found is None


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


def _roles() -> dict[str, nnx.State]:
    def param(role: Role, size: int, value: float = 2.0) -> nnx.Param:
        return nnx.Param(jnp.full((size, 1), value), axes=(None, None), role=role)

    tuned = nnx.State(
        {
            "experts": param(Role.ROUTED_EXPERT, 2),
            "router": param(Role.ROUTER, 3),
            "attention": param(Role.ATTENTION, 1),
            "head": param(Role.HEAD, 1),
        }
    )
    return {TUNED: tuned, FROZEN: nnx.State({"bias": param(Role.SELECTION_BIAS, 5)})}


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_parts_have_rates_of_their_own_in_all_that_a_rate_does(weight_decay: float) -> None:
    params = _roles()
    common = {"schedule": "cosine", "warmup_steps": 2, "weight_decay": weight_decay}
    rates = {"non_expert_modules": 0.25, "router": 0.5}
    own = OptimizerConfig(learning_rate=1.0, rates=rates, **common)
    optimizer = make_optimizer(own, steps=8)
    state = optimizer.init(params)
    expected = {"experts": 1.0, "router": 0.5, "attention": 0.25, "head": 0.25}
    alone = {
        rate: make_optimizer(OptimizerConfig(learning_rate=rate, **common), steps=8)
        for rate in set(expected.values())
    }
    states = {rate: each.init(params) for rate, each in alone.items()}
    # Large enough to be clipped, by the norm of all parts together.
    grads = jax.tree.map(lambda x: jnp.linspace(-3.0, 4.0, x.size).reshape(x.shape), params)
    for _ in range(4):
        updates, state = optimizer.update(grads, state, params)
        for rate, each in alone.items():
            same, states[rate] = each.update(grads, states[rate], params)
            for name in (name for name, its in expected.items() if its == rate):
                np.testing.assert_array_equal(updates[TUNED][name][...], same[TUNED][name][...])
        assert not updates[FROZEN]["bias"][...].any()
    assert updates[TUNED]["router"][...].all()


def test_a_rate_of_what_is_not_trained_is_refused() -> None:
    optimizer = make_optimizer(OptimizerConfig(rates={"embedding": 1e-3}), steps=1)
    with pytest.raises(InputError, match="optimizer.rates: embedding: it is not trained; expected"):
        optimizer.init(_roles())
