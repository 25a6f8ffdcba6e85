"""What would make a step fit, with the numbers that say so."""

import dataclasses
import math

import jax.numpy as jnp

from esft_jax.accelerators import GPUS
from esft_jax.planning.analysis import Case, Plan, what_is_trained
from esft_jax.planning.gpu_memory import FRACTION, fraction_for, memory_fraction
from esft_jax.sharding import EXPERT, REPLICA, count_slices, make_mesh
from esft_jax.topology import hardware
from esft_jax.training.fit import takes_from_host


def suggestions(case: Case, plan: Plan) -> list[str]:
    """Changes to the configuration or the topology, for a plan that does not fit.

    Weights and moments on another mesh follow from its shardings. Nothing is compiled again.
    """
    found = (
        _method(case, plan),
        _expert_axis(case, plan),
        _quantised(case, plan),
        _lean_states(case, plan),
        _micro_batches(case, plan),
        _remat(case),
        _frozen_memory(case, plan),
        _memory_fraction(case, plan),
        _larger_slice(case, plan),
    )
    return [text for text in found if text]


def _method(case: Case, plan: Plan) -> str | None:
    if case.config.method != "full":
        return None
    train = dataclasses.replace(case.config.train, balance_loss=0.0)
    optimizer = dataclasses.replace(case.config.optimizer, rates={})  # of what is not trained then
    config = dataclasses.replace(
        case.config, method="esft", init="pretrained", train=train, optimizer=optimizer
    )
    trained, described = what_is_trained(config, case.model)
    other = dataclasses.replace(case, config=config, trained=trained)
    return (
        f"method=esft: weights and moments take {_gigabytes(other.state_bytes(case.mesh))} instead "
        f"of {_gigabytes(plan.memory.state)} per device ({described}), and gradients less, too"
    )


def _expert_axis(case: Case, plan: Plan) -> str | None:
    """Along `expert` a layer's experts are split; along `data` they are copies."""
    devices = list(case.mesh.devices.flat)
    # An expert group lies within one slice and one replica.
    parts = max(count_slices(devices), case.mesh.shape[REPLICA])
    expert = math.gcd(len(devices) // parts, case.model.router.num_experts)
    if expert <= case.mesh.shape[EXPERT]:
        return None
    state = case.state_bytes(make_mesh(-1, expert, devices, case.config.mesh.replica))
    return (
        f"mesh.data=-1 mesh.expert={expert}: weights and moments take {_gigabytes(state)} instead "
        f"of {_gigabytes(plan.memory.state)} per device"
    )


def _quantised(case: Case, plan: Plan) -> str | None:
    """Most of a model that is not fully trained is only read."""
    now = case.config.quantise
    if case.config.method == "full" or "none" not in (now.experts, now.rest):
        return None
    quantise = dataclasses.replace(
        now, experts="int4" if now.experts == "none" else now.experts, rest="int8"
    )
    if case.config.frozen_memory == "host" and not takes_from_host(quantise, case.mesh):
        return None
    config = dataclasses.replace(case.config, quantise=quantise)
    state = dataclasses.replace(case, config=config).state_bytes(case.mesh)
    return (
        f"quantise.experts={quantise.experts} quantise.rest=int8: weights and moments take "
        f"{_gigabytes(state)} instead of {_gigabytes(plan.memory.state)} per device"
    )


def _lean_states(case: Case, plan: Plan) -> str | None:
    now = case.config.optimizer
    momentless = now.name == "sgd" and not now.momentum
    optimizer = dataclasses.replace(
        now, moments="float32" if momentless else "bfloat16", masters="bfloat16"
    )
    if optimizer == now:
        return None
    config = dataclasses.replace(case.config, optimizer=optimizer)
    state = dataclasses.replace(case, config=config).state_bytes(case.mesh)
    keys = [f"optimizer.{key}=bfloat16" for key in ("moments", "masters")]
    return (
        f"{' '.join(keys[momentless:])}: weights and moments take {_gigabytes(state)} instead of "
        f"{_gigabytes(plan.memory.state)} per device"
    )


def _micro_batches(case: Case, plan: Plan) -> str | None:
    rows = _rows(case)
    if rows == 1:
        return None
    working = plan.memory.working
    size = "" if working is None else f" ({_gigabytes(working)} now)"
    return (
        f"train.micro_batches={case.config.train.batch_size // case.mesh.size}: one row per device "
        f"at a time instead of {rows}; activations{size} shrink with them"
    )


def _remat(case: Case) -> str | None:
    model, config = case.model, case.config
    tokens = _rows(case) * config.data.sequence_length
    size = model.num_layers * tokens * model.hidden_size * jnp.dtype(config.dtype).itemsize
    kept = f"{_gigabytes(size)} per device for all of them"
    match config.train.remat:
        case "offload":
            return None
        case "full":
            return (
                f"train.remat=offload instead of full: the inputs of layers, {kept}, wait for the "
                "backward pass in the memory of the host"
            )
    return (
        f"train.remat=full instead of {config.train.remat}: of a layer, only its input outlives "
        f"the forward pass, {kept}; with train.remat=offload, in the memory of the host"
    )


def _frozen_memory(case: Case, plan: Plan) -> str | None:
    """Where the rest, as it is now, and two layers of experts would find room then."""
    config, memory = case.config, plan.memory
    if config.method == "full" or config.frozen_memory == "host":
        return None
    if not takes_from_host(config.quantise, case.mesh):
        return None
    other = dataclasses.replace(case, config=dataclasses.replace(config, frozen_memory="host"))
    state, layers = other.state_bytes(case.mesh), len(case.model.moe_layers)
    moved = memory.state - state
    assert memory.available is not None
    if state + 2 * moved // layers + (memory.working or 0) > memory.available:
        return None
    return (
        f"frozen_memory=host: weights and moments take {_gigabytes(state)} instead of "
        f"{_gigabytes(memory.state)} per device, and {_gigabytes(moved)} of its host's memory; "
        f"a layer's experts, {_gigabytes(moved / layers)}, come from there when they are used"
    )


def _memory_fraction(case: Case, plan: Plan) -> str | None:
    """JAX leaves a part of a GPU alone unless it is told otherwise."""
    gpu, needed = GPUS.get(hardware(case.topology)), plan.memory.needed
    if gpu is None or needed is None:
        return None
    fraction = fraction_for(gpu, needed)
    if fraction is None:
        return None
    return (
        f"{FRACTION}={fraction:.2f} in the environment: JAX takes as much of the "
        f"{_gigabytes(gpu.memory)} of a device, and {memory_fraction():.2f} now"
    )


def _larger_slice(case: Case, plan: Plan) -> str | None:
    """More devices of the kind, if all of them go to `expert`, which splits nearly everything."""
    memory, expert = plan.memory, case.mesh.shape[EXPERT]
    assert memory.available is not None
    working = memory.working or 0
    factors = (2**power for power in range(1, case.model.router.num_experts.bit_length()))
    for factor in factors:
        splits = case.model.router.num_experts % (factor * expert) == 0
        if splits and memory.state / factor + working <= memory.available:
            break
    else:
        return None
    but = "" if memory.working is None else f", and {_gigabytes(working)} as now for the rest"
    return (
        f"{factor * case.mesh.size} devices of this kind with mesh.expert={factor * expert}: about "
        f"{_gigabytes(memory.state / factor)} of weights and moments each{but}"
    )


def _rows(case: Case) -> int:
    """Rows of one device at a time."""
    train = case.config.train
    return train.batch_size // train.micro_batches // case.mesh.size


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
