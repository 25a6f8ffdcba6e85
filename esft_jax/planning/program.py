"""The step of a run from shapes alone, and what the compiler says of its memory."""

import dataclasses
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike

from esft_jax.accelerators import gpu_of
from esft_jax.adapt.attach import attach
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import Trained
from esft_jax.adapt.partition import partition
from esft_jax.adapt.parts import roles_of
from esft_jax.data_config import DataConfig
from esft_jax.host_memory import PINNED, Memory
from esft_jax.model.config import ModelConfig
from esft_jax.model.params import expert_matrices_on_host
from esft_jax.model.quantised import quantise_model
from esft_jax.model.transformer import Transformer
from esft_jax.moe.transport import Transport
from esft_jax.ops.quantisation import Quantisation
from esft_jax.planning.gpu_memory import granted, memory_fraction
from esft_jax.sharding import param_shardings
from esft_jax.topology import lowering_platform
from esft_jax.train_config import TrainConfig
from esft_jax.training.program import known_refusals, trace_step
from esft_jax.training.state import TrainState, init_state, state_shardings

# Structure, tuned partition and frozen partition of a model.
Parts = tuple[nnx.GraphDef, nnx.State, nnx.State]


@dataclass(frozen=True)
class StepShapes:
    """What a step is given, as shapes with their places on the mesh."""

    mesh: Mesh
    graph: nnx.GraphDef
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: nnx.State

    def trace(self, train: TrainConfig, data: DataConfig) -> jax.stages.Traced:
        """The update that `train` would run with these sections of a configuration."""
        return trace_step(
            train, data, self.graph, self.optimizer, self.state, self.frozen, self.mesh
        )


@dataclass(frozen=True)
class StepMemory:
    """Bytes of one device.

    Attributes:
        frozen: weights that are not trained, in the device's memory.
        tuned: masters of those that are.
        moments: the optimizer's state.
        temporary: activations, gradients and gathered weights, as the compiler lays them out; None
            where it refused or was not asked.
        needed: all together, by the compiler; None where it was not asked, for weights and moments
            alone exceed what there is.
        available: what the device grants; None where it is unknown, as for a CPU.
        frozen_on_host: weights that are not trained, in the memory of the device's host.
        host: all that is in that memory: these weights and, if the compiler was asked and did not
            refuse, activations that are offloaded.
    """

    frozen: int
    tuned: int
    moments: int
    temporary: int | None
    needed: int | None
    available: int | None
    frozen_on_host: int
    host: int

    @property
    def state(self) -> int:
        """Weights and moments."""
        return self.frozen + self.tuned + self.moments

    @property
    def working(self) -> int | None:
        """All the rest, if the compiler was asked: temporaries, the batch, the program."""
        return None if self.needed is None else self.needed - self.state

    @property
    def fits(self) -> bool:
        """Whether the step can run; for all we know, on a device of unknown memory."""
        needed = self.state if self.needed is None else self.needed
        return self.available is None or needed <= self.available


def run_parts(
    model: ModelConfig,
    mesh: Mesh,
    trained: Trained,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    transport: Transport = "all_gather",
    quantisation: Quantisation | None = None,
    masters: DTypeLike = jnp.float32,
) -> Parts:
    """What `train` splits its model into, for `jax.eval_shape`.

    Args:
        dtype: of computation and frozen weights.
        param_dtype: of all weights, as `init: random` makes them; default: `dtype`.
        quantisation: how frozen weights are kept.
        masters: of tuned matrices.
    """
    transformer = Transformer(
        model,
        rngs=nnx.Rngs(0),
        dtype=dtype,
        param_dtype=param_dtype,
        mesh=mesh,
        transport=transport,
    )
    attach(transformer, trained, seed=0)  # like that of `Rngs`, it decides on no shape
    if quantisation is not None:
        also = trained.also if isinstance(trained, ExpertConfig) else ()
        quantise_model(transformer, quantisation, roles_of(also))
    return partition(transformer, trained, masters)


def step_shapes(
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    parts: Callable[[], Parts],
    moments: DTypeLike = jnp.float32,
    frozen_memory: Memory = "device",
) -> StepShapes:
    """The state of a run and its frozen weights; nothing is allocated.

    Args:
        parts: makes the model, such as `run_parts`.
        moments: see `init_state`.
        frozen_memory: where the matrices of frozen experts are kept.
    """
    graph: Any = None

    def build() -> tuple[TrainState, nnx.State]:
        nonlocal graph
        graph, tuned, frozen = parts()
        return init_state(optimizer, tuned, frozen, moments), frozen

    def place(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(lambda x, sharding: x.update(sharding=sharding), tree, shardings)

    state, frozen = jax.eval_shape(build)
    return StepShapes(
        mesh,
        graph,
        optimizer,
        place(state, state_shardings(state, mesh)),
        place(frozen, param_shardings(frozen, mesh, expert_matrices_on_host(frozen_memory))),
    )


def compile_step(shapes: StepShapes, traced: jax.stages.Traced) -> tuple[StepMemory, str | None]:
    """Compile a step for the devices of its mesh: its memory, and the compiled program (HLO).

    There is no program if weights and moments alone are too large, for then the compiler is not
    asked, or if the compiler refuses it. That for TPUs refuses what does not fit; those for GPUs
    and CPUs refuse nothing.
    """
    device = shapes.mesh.devices.flat[0]
    state, on_host = shapes.state, local_bytes(shapes.frozen, "host")
    before = StepMemory(
        frozen=local_bytes(shapes.frozen),
        tuned=local_bytes(state.tuned),
        moments=local_bytes(state.opt_state),
        temporary=None,
        needed=None,
        available=device_memory(device),
        frozen_on_host=on_host,
        host=on_host,
    )
    gpu = gpu_of(device.device_kind)
    # How much of a GPU may be taken is for the user to say.
    most = before.available if gpu is None else granted(gpu, 1.0)
    if most is not None and before.state > most:
        return before, None
    lowered = traced.lower(lowering_platforms=(lowering_platform([device]),))
    try:
        with known_refusals():
            compiled, text = _compile(lowered, device.platform)
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.replace(before, needed=_refusal(error)[0]), None
    memory: Any = compiled.memory_analysis()
    needed = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    found = dataclasses.replace(
        before,
        temporary=memory.temp_size_in_bytes,
        needed=needed,
        host=on_host + memory.host_temp_size_in_bytes,
    )
    return found, text


def _compile(lowered: jax.stages.Lowered, platform: str) -> tuple[jax.stages.Compiled, str]:
    """A compiled program, and its text."""
    if platform != "tpu":
        compiled = lowered.compile()
        return compiled, compiled.as_text() or ""
    # JAX cannot read back every program of that compiler, which may be the newer of the two.
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=options)
        (written,) = Path(folder).glob("*.after_codegen.txt")
        return compiled, written.read_text()


def device_memory(device: jax.Device) -> int | None:
    """Bytes of a device that a program may take; None for a CPU.

    A TPU keeps a part of its memory for itself, and only its compiler says how much: by refusing a
    program that no chip holds. Of a GPU, JAX takes a share.
    """
    match device.platform:
        case "tpu":
            place = SingleDeviceSharding(device)
            large = jax.ShapeDtypeStruct((2**42,), jnp.int8, sharding=place)
            traced = jax.jit(jnp.negative).trace(large)
            try:
                traced.lower(lowering_platforms=("tpu",)).compile()
            except jax.errors.JaxRuntimeError as error:
                return _refusal(error)[1]
        case "gpu":
            gpu = gpu_of(device.device_kind)
            return None if gpu is None else granted(gpu, memory_fraction())
    return None


def _refusal(error: jax.errors.JaxRuntimeError) -> tuple[int, int]:
    """Bytes that a program needs and may take, by the compiler for TPUs; else raises the error."""
    found = re.search(r"required .*\(([\d.]+)([MGT])\) exceeds .*\(([\d.]+)([MGT])\)", str(error))
    if found is None:
        raise error
    sizes = (float(found[i]) * 2 ** (20 + 10 * "MGT".index(found[i + 1])) for i in (1, 3))
    needed, available = map(int, sizes)
    return needed, available


def local_bytes(tree: Any, memory: Memory = "device") -> int:
    """Bytes that one device, or its host for it, holds of arrays, or of shapes with shardings."""
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
        if (x.sharding.memory_kind == PINNED) == (memory == "host")
    )
