"""A step on a topology: its memory, operations, traffic and least time."""

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from esft_jax.accelerators import PEAKS
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import Trained
from esft_jax.adapt.partition import trained_roles
from esft_jax.adapt.parts import check_rates
from esft_jax.checkpoint.load import local_folder
from esft_jax.config import RunConfig
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.model.config import ModelConfig
from esft_jax.planning.collectives import received_bytes, within_slices
from esft_jax.planning.operations import KernelRows, count_operations
from esft_jax.planning.program import (
    StepMemory,
    StepShapes,
    compile_step,
    local_bytes,
    run_parts,
    step_shapes,
)
from esft_jax.planning.roofline import Roofline
from esft_jax.routing.choose import affordable_experts, given_experts
from esft_jax.selection_config import SelectConfig
from esft_jax.sharding import count_slices, make_mesh
from esft_jax.topology import ahead_of_time_devices, hardware
from esft_jax.training.fit import check_fit
from esft_jax.training.methods import trained_by
from esft_jax.training.operations import model_operations
from esft_jax.training.optimizer import make_optimizer
from esft_jax.training.run_folder import RunFolder


@dataclass(frozen=True)
class Plan:
    """What a training step is on a topology.

    Attributes:
        topology: such as `v5e:2x4`.
        mesh: devices along `data` and `expert`.
        method: `esft`, `lora` or `full`.
        experts: what is trained, in words.
        tokens: of one device in a step.
        memory: bytes of one device.
        operations: floating-point operations per token as compiled, with loops, kernels and
            rematerialisation; None but for TPUs, where alone they can be counted.
        experts_overhead: operations of the experts' kernels as compiled, padding of rows and widths
            to blocks included, over those of the routed rows alone; None where not counted.
        model_operations: the same by arithmetic, nothing computed twice.
        received: bytes that one device receives from others in a step, by kind of collective, with
            kinds of their own between slices; None if nothing was compiled.
        roofline: least time of a step; None for unknown hardware, or if nothing was compiled.
        seconds: spent on tracing and compiling.
    """

    topology: str
    mesh: dict[str, int]
    method: str
    experts: str
    tokens: int
    memory: StepMemory
    operations: float | None
    experts_overhead: float | None
    model_operations: float
    received: dict[str, float] | None
    roofline: Roofline | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """All of it, and what follows from it, for a JSON file."""
        values = dataclasses.asdict(self)
        values["fits"] = self.memory.fits
        if self.roofline is not None:
            values["roofline"] |= {
                "overlapped": self.roofline.overlapped,
                "serial": self.roofline.serial,
            }
        return values


@dataclass(frozen=True)
class Case:
    """A run to be planned: a configuration on a mesh, with what it trains.

    Attributes:
        described: what it trains, in words.
    """

    config: RunConfig
    topology: str
    model: ModelConfig
    mesh: Mesh
    trained: Trained
    described: str

    @property
    def tokens(self) -> int:
        """Tokens of one device in a step."""
        return self.config.train.batch_size * self.config.data.sequence_length // self.mesh.size

    def shapes(self, mesh: Mesh | None = None) -> StepShapes:
        """What its step is given; on another mesh of the same devices, if one is named."""
        config, mesh = self.config, mesh or self.mesh
        parts = partial(
            run_parts,
            self.model,
            mesh,
            self.trained,
            jnp.dtype(config.dtype),
            jnp.float32 if config.init == "random" else None,
            config.mesh.transport,
            config.quantise.chosen,
            jnp.dtype(config.optimizer.masters),
        )
        optimizer = make_optimizer(config.optimizer, config.train.steps, mesh)
        return step_shapes(mesh, optimizer, parts, config.optimizer.moments, config.frozen_memory)

    def state_bytes(self, mesh: Mesh) -> int:
        """Weights and moments in the memory of one device, on another mesh."""
        shapes = self.shapes(mesh)
        return local_bytes((shapes.frozen, shapes.state.tuned, shapes.state.opt_state))


def open_case(config: RunConfig, topology: str, experts_per_layer: int | None = None) -> Case:
    """Check a configuration on a topology; of its files, only the model's `config.json` is read.

    Args:
        experts_per_layer: how many experts are assumed to be trained, or updated, in every layer,
            where none are chosen yet; default: what `select.top_k` or a budget says, or else a
            tenth of them.

    Raises:
        InputError: naming what does not fit together.
    """
    folder = local_folder(config.model, files=("config.json",))
    model = load_model_config(folder)
    devices = ahead_of_time_devices(topology)
    mesh = make_mesh(config.mesh.data, config.mesh.expert, devices, config.mesh.replica)
    if mesh.size < len(devices):
        raise InputError(f"mesh: {mesh.size} devices; expected all {len(devices)} of {topology}")
    check_fit(model, mesh, config)
    trained, described = what_is_trained(config, model, experts_per_layer)
    check_rates(config.optimizer.rates, trained_roles(trained, model))
    return Case(config, topology, model, mesh, trained, described)


def what_is_trained(
    config: RunConfig, model: ModelConfig, per_layer: int | None = None
) -> tuple[Trained, str]:
    """What a run trains, its experts given or assumed (see `open_case`), and the same in words."""
    experts, described = None, ""
    if config.selects_experts:
        kept = RunFolder(config.output).expert_cfg
        experts = given_experts(
            config.select,
            config.expert_cfg,
            kept,
            model,
            config.dtype,
            low_rank=config.method == "lora",
        )
        if experts is None:
            experts, described = _assumed(config.select, model, config.dtype, per_layer)
        elif per_layer is None:
            total = model.router.num_experts * len(model.moe_layers)
            described = f"{experts.num_experts_selected} of {total} experts, as chosen"
        else:
            raise InputError("--experts-per-layer: the run has its experts already")
    elif per_layer is not None:
        raise InputError("--experts-per-layer: the run selects no experts")
    trained = trained_by(config.method, config.lora, model, experts)
    if trained is None:
        return None, "all parameters"
    if isinstance(trained, ExpertConfig):
        return trained, described
    names = [target for target in trained.targets if target != "selected_experts"]
    on = ", ".join([*names, described] if described else names)
    return trained, f"rank {trained.rank} on {on}"


def _assumed(
    select: SelectConfig, model: ModelConfig, dtype: str, per_layer: int | None
) -> tuple[ExpertConfig, str]:
    """As many experts in every layer as will be chosen, spread evenly, and the same in words."""
    total = model.router.num_experts
    if per_layer is None:
        affordable = affordable_experts(select, model, dtype)
        spread = None if affordable is None else min(total, affordable // len(model.moe_layers))
        per_layer = select.top_k or spread or max(1, total // 10)
    if not 1 <= per_layer <= total:
        raise InputError(f"--experts-per-layer: {per_layer}; expected 1 to {total}")
    ids = tuple(i * total // per_layer for i in range(per_layer))
    experts = ExpertConfig(dict.fromkeys(model.moe_layers, ids), select.also)
    return experts, f"{per_layer} of {total} experts in each layer, assumed"


def make_plan(case: Case) -> Plan:
    """Trace and compile the step of a case."""
    begin = time.perf_counter()
    config, model, mesh, trained = case.config, case.model, case.mesh, case.trained
    shapes = case.shapes()
    traced = shapes.trace(config.train, config.data)
    operations = overhead = None
    if mesh.devices.flat[0].platform == "tpu":
        micro_batch = case.tokens // config.train.micro_batches
        kernels = KernelRows.balanced(model, mesh, trained, micro_batch)
        found = count_operations(traced.jaxpr.jaxpr, kernels, mesh.size)
        operations = found.total / case.tokens
        overhead = found.experts / found.experts_exact
    by_arithmetic = model_operations(model, trained, config.data.sequence_length)
    memory, text = compile_step(shapes, traced)
    received = roofline = None
    if text is not None:
        received = received_bytes(text, mesh.size, count_slices(list(mesh.devices.flat)))
        moved = sum(within_slices(received).values())
        roofline = _roofline(case, memory, operations or by_arithmetic, moved)
    return Plan(
        topology=case.topology,
        mesh=dict(mesh.shape),
        method=config.method,
        experts=case.described,
        tokens=case.tokens,
        memory=memory,
        operations=operations,
        experts_overhead=overhead,
        model_operations=by_arithmetic,
        received=received,
        roofline=roofline,
        seconds=time.perf_counter() - begin,
    )


def _roofline(
    case: Case, memory: StepMemory, operations: float, received: float
) -> Roofline | None:
    peaks = PEAKS.get(hardware(case.topology))
    if peaks is None:
        return None
    # Every micro-batch reads all weights forward and backward, and those of the host are written to
    # the device's memory before; the optimizer reads and writes masters and moments.
    passes = 2 * case.config.train.micro_batches
    weights = memory.frozen + memory.tuned + 2 * memory.frozen_on_host
    moved = passes * weights + 2 * (memory.tuned + memory.moments)
    streamed = passes * memory.frozen_on_host
    return Roofline(
        compute=operations * case.tokens / peaks.flops,
        memory=moved / peaks.memory,
        network=received / peaks.network,
        host=streamed / peaks.host if peaks.host else None,
    )
