"""Optimizers by name: their updates are optax's, their states as large as arithmetic says."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.adapt.tuned import TunedParam
from esft_jax.checkpoint.load import load_model
from esft_jax.model.params import Role
from esft_jax.optimizer_config import OPTIMIZER_KEYS, OptimizerConfig
from esft_jax.planning.program import local_bytes
from esft_jax.sharding import make_mesh
from esft_jax.training.checkpoint import Checkpoints, Position, abstract_state
from esft_jax.training.optimizer import make_optimizer
from esft_jax.training.rounding import Rounding
from esft_jax.training.state import TrainState, init_state, place_state, state_shardings, tuned_only
from esft_jax.training.step import apply_gradients, make_train_step

RATE, UPDATES = 0.01, 3
# Name: shape, axes, role, class. No two sizes are the same.
SHAPES: dict[str, tuple] = {
    "bank": ((4, 6, 10), ("experts", None, None), Role.ROUTED_EXPERT, TunedParam),
    "bank_bias": ((4, 10), ("experts", None), Role.ROUTED_EXPERT, TunedParam),
    "tall": ((2, 16, 3), ("layers", "embed", None), Role.ATTENTION, nnx.Param),
    "taps": ((2, 5, 7), ("layers", "taps", None), Role.ATTENTION, nnx.Param),
    "norm": ((2, 6), ("layers", None), Role.NORM, nnx.Param),
    "head": ((9, 8), (None, "vocab"), Role.HEAD, nnx.Param),
}
MATRICES = ("bank", "tall", "taps", "head")
ORTHOGONALISED = ("bank", "tall")
FROZEN = nnx.State({"other": nnx.Param(jnp.ones(3), axes=(None,), role=Role.NORM)})


def tuned(number: int, scale: float = 0.1) -> nnx.State:
    rng = np.random.default_rng(number)
    return nnx.State(
        {
            name: kind(
                jnp.asarray(scale * rng.normal(size=shape), jnp.float32), axes=axes, role=role
            )
            for name, (shape, axes, role, kind) in SHAPES.items()
        }
    )


def config(name: str, **options: Any) -> OptimizerConfig:
    return OptimizerConfig(name=name, learning_rate=RATE, clip_norm=1e3, **options)


def start(
    given: OptimizerConfig, mesh: Mesh | None = None
) -> tuple[optax.GradientTransformation, TrainState]:
    optimizer = make_optimizer(given, UPDATES, mesh)
    params = jax.tree.map(lambda x: x.astype(given.masters), tuned(0))
    if mesh is None:
        return optimizer, init_state(optimizer, params, FROZEN, given.moments)
    return optimizer, place_state(optimizer, params, FROZEN, mesh, given.moments)[0]


def updated(
    optimizer: optax.GradientTransformation, state: TrainState, updates: int = UPDATES
) -> TrainState:
    """After so many updates, each with gradients of its own."""

    @jax.jit
    def one(state: TrainState, grads: nnx.State) -> TrainState:
        rounding = Rounding.of(0, state.step, np.arange(4, dtype=np.int32))
        after = apply_gradients(optimizer, grads, FROZEN, rounding, state.tuned, state.opt_state)
        return TrainState(state.step + 1, state.skipped, *after)

    for _ in range(updates):
        state = one(state, tuned(10 + int(state.step)))
    return state


def alone(optimizer: optax.GradientTransformation, name: str, index: tuple) -> np.ndarray:
    """One matrix or vector, updated by an optimizer that sees nothing else."""
    value = tuned(0)[name].get_value()[index]
    state = optimizer.init(value)
    for step in range(UPDATES):
        grads = tuned(10 + step)[name].get_value()[index]
        updates, state = optimizer.update(grads, state, value)
        value = optax.apply_updates(value, updates)
    return np.asarray(value)


def _decayed(direction: optax.GradientTransformation, decay: float) -> optax.GradientTransformation:
    return optax.chain(
        direction, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(RATE)
    )


def _adamw(decay: float) -> optax.GradientTransformation:
    return optax.adamw(RATE, 0.9, 0.95, weight_decay=decay)


def _adafactor(decay: float) -> optax.GradientTransformation:
    direction = optax.adafactor(
        min_dim_size_to_factor=1, multiply_by_parameter_scale=False, clipping_threshold=1.0
    )
    return _decayed(optax.chain(direction, optax.scale(-1)), decay)


REFERENCES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": lambda decay: optax.lion(RATE, 0.9, 0.99, weight_decay=decay),
    "muon": lambda decay: optax.contrib.muon(RATE, weight_decay=decay, consistent_rms=0.2),
    "sgd": lambda decay: _decayed(optax.trace(0.9), decay),
}
NAMES = sorted(REFERENCES)


def test_every_optimizer_is_judged() -> None:
    assert set(NAMES) == set(OPTIMIZER_KEYS)


@pytest.mark.parametrize("name", NAMES)
def test_updates_are_those_of_optax_for_each_matrix_alone(name: str) -> None:
    decay = 0.1
    after = updated(*start(config(name, weight_decay=decay))).tuned
    for leaf, param in after.items():
        depth = {"bank": 1, "bank_bias": 1, "tall": 1, "taps": 1, "norm": 1, "head": 0}[leaf]
        orthogonal = name != "muon" or leaf in ORTHOGONALISED
        reference = REFERENCES[name if orthogonal else "adamw"]
        optimizer = reference(decay if leaf in MATRICES else 0.0)
        for index in np.ndindex(param.get_value().shape[:depth]):
            expected = alone(optimizer, leaf, index)
            np.testing.assert_allclose(param.get_value()[index], expected, atol=2e-6, err_msg=leaf)
            assert np.abs(expected - tuned(0)[leaf].get_value()[index]).max() > RATE / 50


def _moments(name: str) -> int:
    """Numbers in the moments of an optimizer, by arithmetic."""
    sizes = {leaf: math.prod(shape) for leaf, (shape, *_) in SHAPES.items()}
    everything = sum(sizes.values())
    match name:
        case "adamw":
            return 2 * everything
        case "adafactor":
            sides = {leaf: shape[-2] + shape[-1] for leaf, (shape, *_) in SHAPES.items()}
            kept = {
                leaf: math.prod(SHAPES[leaf][0][:-2]) * sides[leaf] if leaf in MATRICES else size
                for leaf, size in sizes.items()
            }
            return sum(kept.values())
        case "muon":
            return 2 * everything - sum(sizes[leaf] for leaf in ORTHOGONALISED)
    return everything


# Counters: of the schedule, and of all optimizers but plain momentum.
COUNTERS = {"adamw": 2, "adafactor": 2, "lion": 2, "muon": 3, "sgd": 1}


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_state_takes_the_bytes_that_arithmetic_says(name: str, moments: str) -> None:
    _, state = start(config(name, moments=moments))
    size = {"float32": 4, "bfloat16": 2}[moments]
    assert local_bytes(state.opt_state) == size * _moments(name) + 4 * COUNTERS[name]


def test_descent_without_momentum_keeps_nothing() -> None:
    optimizer, state = start(config("sgd", momentum=0.0, weight_decay=0.0))
    assert local_bytes(state.opt_state) == 4
    after = updated(optimizer, state, 1).tuned
    expected = jax.tree.map(lambda p, g: p - RATE * g, tuned(0), tuned(10))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), after, expected)


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_mesh_changes_nothing(name: str, kept: str) -> None:
    """Within rounding of sums, which may turn a rounding by chance the other way."""
    given = config(name, moments=kept, masters=kept)
    one = updated(*start(given))
    mesh = make_mesh(2, 4)
    optimizer, state = start(given, mesh)
    many = updated(optimizer, state)
    assert local_bytes(state.opt_state) < local_bytes(one.opt_state)
    different = 0
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert x.dtype == y.dtype
        wide = np.asarray(x, np.float32), np.asarray(y, np.float32)
        if x.dtype == jnp.bfloat16:
            different += int((wide[0] != wide[1]).sum())
            np.testing.assert_allclose(*wide, atol=1e-3, rtol=2.0**-7)
        else:
            np.testing.assert_allclose(*wide, atol=1e-5, rtol=1e-5)
    assert different <= 5


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_continues_bit_for_bit(name: str, tmp_path) -> None:
    mesh = make_mesh(2, 4)
    optimizer, state = start(config(name, moments="bfloat16", masters="bfloat16"), mesh)
    whole = updated(optimizer, state, 3)
    checkpoints = Checkpoints(tmp_path, {}, None)
    saved = updated(optimizer, state, 1)
    checkpoints.save(1, saved, Position({}, None, 3, {}))
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, {}, None)
    restored, _ = checkpoints.restore(abstract_state(saved, state_shardings(saved, mesh)))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, updated(optimizer, restored, 2), whole)


def test_states_of_another_shape_are_on_every_device() -> None:
    """Of a caller's own optimizer, which does not say what their axes are."""
    optimizer, params = optax.adafactor(RATE, min_dim_size_to_factor=5), tuned(0)
    state, _ = place_state(optimizer, params, FROZEN, make_mesh(2, 4), jnp.bfloat16)
    factored = state.opt_state.inner_states["tuned"].inner_state[0]
    rows = factored.v_row["tuned"]["bank"].get_value()
    assert rows.sharding.is_fully_replicated and rows.dtype == jnp.bfloat16
    assert not factored.v["tuned"]["bank_bias"].get_value().sharding.is_fully_replicated
    after = updated(tuned_only(optimizer), state, 1)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(map(jnp.any, jax.tree.leaves(jax.tree.map(jnp.not_equal, after.tuned, tuned(0)))))


EXPERTS = ExpertConfig({1: (3, 0), 2: (5,), 3: (1, 6, 7)}, ("attention", "norms"))
RATES = {"adamw": 1e-2, "adafactor": 1e-2, "lion": 3e-3, "muon": 1e-2, "sgd": 0.3}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_learns_with_states_in_bfloat16(name: str, base) -> None:
    """Four rows of random tokens, by heart."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 4096, (4, 16)).astype(np.int32)
    batch = {
        "tokens": tokens,
        "targets": np.roll(tokens, -1, axis=1),
        "segment_ids": np.ones_like(tokens),
        "positions": np.broadcast_to(np.arange(16, dtype=np.int32), tokens.shape),
        "loss_weights": np.ones(tokens.shape, np.float32),
    }
    model = load_model(base)
    attach_tuned_experts(model, EXPERTS)
    graph, params, frozen = partition(model, EXPERTS, jnp.bfloat16)
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(params)}
    assert kinds == {"bfloat16", "float32"}  # matrices, and vectors
    given = OptimizerConfig(name=name, learning_rate=RATES[name], weight_decay=0.0)
    optimizer = make_optimizer(given, 40)
    state = init_state(optimizer, params, frozen, jnp.bfloat16)
    step = jax.jit(make_train_step(graph, optimizer, micro_batches=2))
    losses = []
    for _ in range(40):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 2
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.tuned)} == kinds
