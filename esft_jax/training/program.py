"""The step of a run as a program: one recipe for arrays, and for shapes alone.

`train` runs what is traced here; `plan` compiles it for devices that are not at hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from esft_jax.config import RunConfig
from esft_jax.errors import InputError
from esft_jax.sharding import batch_sharding
from esft_jax.training.state import TrainState, state_shardings
from esft_jax.training.step import jit_train_step, make_train_step


def batch_shapes(config: RunConfig, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch of an update, `[train.batch_size, data.sequence_length]` each, on the mesh.

    Of several sources, it has the index of each row's source besides.
    """
    shape = (config.train.batch_size, config.data.sequence_length)
    types = dict.fromkeys(("tokens", "targets", "segment_ids", "positions"), jnp.int32)
    shapes = {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))
        for name, dtype in (types | {"loss_weights": jnp.float32}).items()
    }
    if config.data.mix:
        shapes["sources"] = jax.ShapeDtypeStruct(
            shape[:1], jnp.int32, sharding=batch_sharding(mesh)
        )
    return shapes


@contextmanager
def known_refusals() -> Iterator[None]:
    """Say in one line what a compiler does not support, while it compiles."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # TPU slices whose links do not reach every chip at once, such as v5e:8x8.
        if "agged all-to-all is currently not supported" not in str(error):
            raise
        raise InputError(
            "mesh.transport: the compiler refuses ragged_all_to_all on these devices; expected "
            "all_gather"
        ) from error


def trace_step(
    config: RunConfig,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: nnx.State,
    mesh: Mesh,
) -> jax.stages.Traced:
    """The update `(state, frozen, batch) -> (state, metrics)` of a run, to be lowered and compiled.

    Args:
        state, frozen: arrays, or their shapes with shardings.
    """
    step = make_train_step(
        graph,
        optimizer,
        micro_batches=config.train.micro_batches,
        remat=config.train.remat,
        balance_weight=config.train.balance_loss,
        sources=config.data.source_names if config.data.mix else (),
    )
    jitted = jit_train_step(step, state_shardings(state, mesh))
    return jitted.trace(state, frozen, batch_shapes(config, mesh))
