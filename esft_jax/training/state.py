"""What a run changes, and where it lives on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.struct import dataclass
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from esft_jax.adapt.partition import FROZEN, TUNED
from esft_jax.sharding import param_shardings


class TunedOnly(optax.GradientTransformationExtraArgs):
    """An optimizer of `{"tuned": ..., "frozen": ...}`; see `tuned_only`."""


def tuned_only(optimizer: optax.GradientTransformation) -> TunedOnly:
    """The same for the tuned partition; the frozen one has no state, and its update is zero.

    `init_state` and `make_train_step` do this to what they are given, unless it was done before.

    Args:
        optimizer: of optax. Its masks and labels see `{"tuned": ..., "frozen": ...}`, with nothing
            for the frozen parameters.
    """
    if isinstance(optimizer, TunedOnly):
        return optimizer
    return TunedOnly(
        *optax.multi_transform(
            {TUNED: optimizer, FROZEN: optax.set_to_zero()}, {TUNED: TUNED, FROZEN: FROZEN}
        )
    )


@dataclass
class TrainState:
    """What a run changes.

    Attributes:
        step: batches seen.
        skipped: of these, the ones whose loss or gradients were not finite: no update was made.
        tuned: trained parameters, float32.
        opt_state: the optimizer's state; it holds arrays for tuned parameters only.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    tuned: nnx.State
    opt_state: optax.OptState


def init_state(
    optimizer: optax.GradientTransformation, tuned: nnx.State, frozen: nnx.State
) -> TrainState:
    """The state before the first update.

    Args:
        optimizer: any of optax; `tuned_only` of it is what is applied.
        tuned, frozen: from `partition`. On a mesh, see `place_state`.
    """
    opt_state = tuned_only(optimizer).init({TUNED: tuned, FROZEN: frozen})
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), tuned, opt_state)


def place_state(
    optimizer: optax.GradientTransformation, tuned: nnx.State, frozen: nnx.State, mesh: Mesh
) -> tuple[TrainState, Any]:
    """The state before the first update on its devices, and its shardings.

    `tuned` is donated: its buffers live on in the state.
    """

    def start(tuned: nnx.State) -> TrainState:
        return init_state(optimizer, tuned, frozen)

    shardings = state_shardings(jax.eval_shape(start, tuned), mesh)
    return jax.jit(start, out_shardings=shardings, donate_argnums=0)(tuned), shardings


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
    """Shardings of a (possibly abstract) state: moments lie with their parameters."""
    tuned = param_shardings(state.tuned, mesh)
    by_path = {
        jax.tree_util.keystr((jax.tree_util.DictKey(TUNED), *path)): sharding
        for path, sharding in jax.tree_util.tree_leaves_with_path(tuned)
    }
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: tuple, leaf: Any) -> NamedSharding:
        name = jax.tree_util.keystr(path)
        owners = (place for suffix, place in by_path.items() if name.endswith(suffix))
        return next(owners, replicated)

    places: dict[str, Any] = {
        "step": replicated,
        "skipped": replicated,
        "tuned": tuned,
        "opt_state": jax.tree_util.tree_map_with_path(sharding, state.opt_state),
    }
    return TrainState(**places)
