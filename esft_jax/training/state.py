"""What a run changes, and where it lives on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.struct import dataclass
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from esft_jax.adapt.partition import FROZEN, TUNED
from esft_jax.sharding import param_shardings
from esft_jax.training.rounding import is_variable, widened


class TunedOnly(optax.GradientTransformationExtraArgs):
    """An optimizer of `{"tuned": ..., "frozen": ...}`; see `tuned_only`."""


def tuned_only(optimizer: optax.GradientTransformation) -> TunedOnly:
    """The same for the tuned partition; the frozen one has no state, and its update is zero.

    `init_state` and `make_train_step` do this to what they are given, unless it was done before.

    Args:
        optimizer: of optax. Its masks and labels see `{"tuned": ..., "frozen": ...}`, with nothing
            for the frozen parameters. All that it computes with is float32, in whatever type
            masters and moments are kept between updates.
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
        tuned: trained parameters, the masters.
        opt_state: the optimizer's state; it holds arrays for tuned parameters only.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    tuned: nnx.State
    opt_state: optax.OptState


def init_state(
    optimizer: optax.GradientTransformation,
    tuned: nnx.State,
    frozen: nnx.State,
    moments: DTypeLike = jnp.float32,
) -> TrainState:
    """The state before the first update.

    Args:
        optimizer: any of optax; `tuned_only` of it is what is applied.
        tuned, frozen: from `partition`. On a mesh, see `place_state`.
        moments: type that the optimizer's state has where it has the axes of parameters.
    """

    def kept(leaf: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(moments), leaf) if is_variable(leaf) else leaf

    opt_state = tuned_only(optimizer).init({TUNED: widened(tuned), FROZEN: frozen})
    opt_state = jax.tree.map(kept, opt_state, is_leaf=is_variable)
    return TrainState(jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), tuned, opt_state)


def place_state(
    optimizer: optax.GradientTransformation,
    tuned: nnx.State,
    frozen: nnx.State,
    mesh: Mesh,
    moments: DTypeLike = jnp.float32,
) -> tuple[TrainState, Any]:
    """The state before the first update on its devices, and its shardings; see `init_state`.

    `tuned` is donated: its buffers live on in the state.
    """

    def start(tuned: nnx.State) -> TrainState:
        return init_state(optimizer, tuned, frozen, moments)

    shardings = state_shardings(jax.eval_shape(start, tuned), mesh)
    return jax.jit(start, out_shardings=shardings, donate_argnums=0)(tuned), shardings


def state_shardings(state: TrainState, mesh: Mesh) -> Any:
    """Shardings of a (possibly abstract) state: moments lie with their parameters.

    So do their means over a side of a matrix, if they name the axes that are left. What has no
    axes, or others than it names, is on every device.
    """
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(leaf: Any) -> Any:
        axes = getattr(leaf, "axes", ())
        if is_variable(leaf) and len(axes) == getattr(leaf.get_value(), "ndim", None):
            return param_shardings(leaf, mesh)
        return jax.tree.map(lambda _: replicated, leaf)

    places: dict[str, Any] = {
        "step": replicated,
        "skipped": replicated,
        "tuned": param_shardings(state.tuned, mesh),
        "opt_state": jax.tree.map(sharding, state.opt_state, is_leaf=is_variable),
    }
    return TrainState(**places)
