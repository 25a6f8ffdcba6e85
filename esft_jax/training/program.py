"""The step of a run as a program: one recipe for arrays, and for shapes alone.

`train` runs what is traced here; `plan` compiles it for devices that are not at hand.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from esft_jax.data.batch import Batch
from esft_jax.data_config import DataConfig
from esft_jax.errors import InputError
from esft_jax.sharding import batch_sharding
from esft_jax.train_config import TrainConfig
from esft_jax.training.state import TrainState, state_shardings
from esft_jax.training.step import Loss, jit_train_step, make_train_step, token_loss


def batch_shapes(
    rows: int, length: int, *, mixed: bool, sharding: NamedSharding | None = None
) -> Batch:
    """The batch of an update, as shapes.

    Args:
        mixed: rows are of several sources.
        sharding: of all arrays.
    """

    def array(dtype: DTypeLike, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    numbers = array(jnp.int32, rows, length)
    batch = Batch(
        tokens=numbers,
        targets=numbers,
        segment_ids=numbers,
        positions=numbers,
        loss_weights=array(jnp.float32, rows, length),
    )
    if mixed:
        batch["sources"] = array(jnp.int32, rows)
    return batch


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
    train: TrainConfig,
    data: DataConfig,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: nnx.State,
    mesh: Mesh,
    loss: Loss = token_loss,
    seed: int = 0,
) -> jax.stages.Traced:
    """The update `(state, frozen, batch) -> (state, metrics)` of a run, to be lowered and compiled.

    Args:
        state, frozen: arrays, or their shapes with shardings.
        seed: see `make_train_step`.
    """
    step = make_train_step(
        graph,
        optimizer,
        loss=loss,
        micro_batches=train.micro_batches,
        remat=train.remat,
        balance_weight=train.balance_loss,
        sources=data.source_names if data.mix and loss is token_loss else (),
        seed=seed,
    )
    jitted = jit_train_step(step, state_shardings(state, mesh))
    batch = batch_shapes(
        train.batch_size,
        data.sequence_length,
        mixed=bool(data.mix),
        sharding=batch_sharding(mesh),
    )
    return jitted.trace(state, frozen, batch)
