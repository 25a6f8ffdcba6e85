"""Whether a model and its batches fit a mesh, before anything is compiled."""

from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from esft_jax.config import QuantiseConfig, RunConfig
from esft_jax.errors import InputError
from esft_jax.memory import check_fits
from esft_jax.model.config import ModelConfig
from esft_jax.sharding import EXPERT
from esft_jax.train_config import TrainConfig
from esft_jax.training.program import batch_shapes


def check_fit(model: ModelConfig, mesh: Mesh, config: RunConfig) -> None:
    """Check that a model and its batches can be split over a mesh, and kept as a run wants it.

    Raises:
        InputError: naming the key that is wrong.
    """
    experts, shards = model.router.num_experts, mesh.shape[EXPERT]
    if experts % shards:
        raise InputError(f"mesh.expert: {shards} does not divide the model's {experts} experts")
    check_rows(model, config.row_lengths)
    train = config.train
    micro_batch = train.batch_size // train.micro_batches
    if micro_batch % mesh.size:
        raise InputError(
            f"train.batch_size / train.micro_batches: {micro_batch} rows cannot be split over "
            f"{mesh.size} devices"
        )
    if config.frozen_memory == "host" and not takes_from_host(config.quantise, mesh):
        raise InputError(
            f"frozen_memory: XLA for TPUs copies all {config.quantise.experts} experts to the "
            "device at once; expected quantise.experts: none with host, or device"
        )


def takes_from_host(quantise: QuantiseConfig, mesh: Mesh) -> bool:
    """Whether devices can take one layer of experts at a time from the memory of the host.

    XLA's compiler for TPUs lays codes of eight bits out anew before it slices them: it keeps whole
    stacks on the device, more than once.
    """
    return quantise.experts == "none" or mesh.devices.flat[0].platform != "tpu"


def check_rows(model: ModelConfig, row_lengths: Mapping[str, int]) -> None:
    """Check that a model takes rows as long as these.

    Args:
        row_lengths: tokens, by section of the configuration.

    Raises:
        InputError: naming the key that is wrong.
    """
    for section, length in row_lengths.items():
        if length > model.max_positions:
            raise InputError(
                f"{section}.sequence_length: {length} tokens; the model's limit is "
                f"{model.max_positions} (max_position_embeddings)"
            )


def check_memory(train: TrainConfig, length: int, token_bytes: int, devices: int) -> None:
    """Check that a batch is not out of all proportion to the memory of a device.

    What surely is in it at one time is counted: a batch, and the input of a layer. The compiler
    knows the rest, when it has compiled the step.

    Args:
        length: tokens per row.
        token_bytes: of one token in the input of a layer.
        devices: of the mesh.

    Raises:
        InputError: with the sizes.
    """
    batch = batch_shapes(train.batch_size, length, mixed=False)
    rows = train.batch_size // devices // train.micro_batches
    check_fits(
        sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(batch)) // devices
        + rows * length * token_bytes,
        f"train.batch_size: {train.batch_size} rows of {length} tokens take at least",
    )
