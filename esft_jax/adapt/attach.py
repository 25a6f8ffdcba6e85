"""Giving a model the parameters that a run adds to it: tuned experts, or low-rank factors.

Letters: L MoE layers, E experts of a layer.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Shaped

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.factors import LowRank, LowRankExperts
from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.adapt.partition import check_experts
from esft_jax.adapt.slots import LowRankLayout, TunedLayout
from esft_jax.adapt.tuned import ReadExpert, TunedExperts
from esft_jax.errors import InputError
from esft_jax.host_memory import to_device, to_memory_of
from esft_jax.model.transformer import Transformer
from esft_jax.sharding import EXPERT, RULES


def attach(
    model: Transformer,
    trained: Trained,
    seed: int,
    loads: Float[np.ndarray, "L E"] | None = None,
    read: ReadExpert | None = None,
) -> None:
    """Give the model the parameters that a run adds to it.

    Args:
        seed: of the initialisation of low-rank factors.
        loads, read: see `attach_tuned_experts`.
    """
    if isinstance(trained, LoRA):
        attach_factors(model, trained, seed, loads)
    elif trained is not None:
        attach_tuned_experts(model, trained, loads, read)


def attach_tuned_experts(
    model: Transformer,
    experts: ExpertConfig,
    loads: Float[np.ndarray, "L E"] | None = None,
    read: ReadExpert | None = None,
) -> None:
    """Give the model a tuned bank: float32 copies of the selected experts.

    From here on the model computes these experts from the bank; the base ones keep their values.
    Without any selected expert (only other parts are trained) there is no bank.

    Args:
        loads: share of each MoE layer's tokens that each expert is expected to get. With it, base
            experts move between devices, so that all compute about as many (`placement.py`).
        read: an expert's matrices in full precision, for a model that holds quantised ones.
    """
    check_plain(model)
    config = model.config
    check_experts(experts, config)
    if not experts.num_experts_selected:
        return
    shards = 1 if model.mesh is None else model.mesh.shape[EXPERT]
    layout = TunedLayout.from_experts(
        experts.experts, config.moe_layers, config.router.num_experts, shards, loads
    )
    _move(model, layout)
    base = model.moe_blocks.moe.experts.weights
    model.tuned_experts = TunedExperts.from_base(base, layout, model.mesh, read)


def attach_factors(
    model: Transformer,
    lora: LoRA,
    seed: int,
    loads: Float[np.ndarray, "L E"] | None = None,
) -> None:
    """Give the model low-rank factors: updates of 0 at first, for B is 0.

    Where experts are split over devices, base experts move between these so that all of them
    update about as many (`place_updated_experts`).

    Args:
        loads: see `attach_tuned_experts`.
    """
    check_plain(model)
    config, rank, scale, mesh = model.config, lora.rank, lora.scale, model.mesh
    keys = nnx.Rngs(seed)

    def update(module: Any, name: str, weight: str, parts: int = 1) -> None:
        param = getattr(module, weight)
        columns = param.get_value().shape[-1] // parts
        module.lora[name] = LowRank.of(param, columns, rank, scale, keys.params(), mesh)

    def update_mlp(mlp: Any) -> None:
        for name in ("gate", "up"):
            update(mlp, name, "gate_up", 2)
        update(mlp, "down", "down")

    if "attention" in lora.targets:
        for block in filter(None, (model.dense_blocks, model.moe_blocks)):
            for attention in block.attentions:
                for name in attention.matrices if attention else ():
                    update(attention, name, name)
    if "dense_mlps" in lora.targets and model.dense_blocks is not None:
        update_mlp(model.dense_blocks.mlp)
    moe = model.moe_blocks.moe
    if "shared_experts" in lora.targets and moe.shared_experts is not None:
        update_mlp(moe.shared_experts)
    lora.experts.validate_ids(config.moe_layers, config.router.num_experts)
    if not lora.experts.num_experts_selected:
        return
    shards = 1 if mesh is None else mesh.shape[EXPERT]
    layout = LowRankLayout.from_experts(
        lora.experts.experts, config.moe_layers, config.router.num_experts, shards, loads
    )
    _move(model, layout)
    model.tuned_experts = LowRankExperts.create(
        config.hidden_size, config.expert_width, rank, scale, layout, keys.params(), mesh
    )


def check_plain(model: Transformer) -> None:
    """Raise an `InputError` for a model that was given parameters: its experts may have moved."""
    factors = any(isinstance(module, LowRank) for _, module in nnx.iter_modules(model))
    if factors or model.tuned_experts is not None:
        raise InputError("the model has tuned experts or factors already; expected a base model")


def _move(model: Transformer, layout: TunedLayout) -> None:
    """Move base experts to their places."""
    positions = layout.placement.positions

    def move(param: nnx.Param) -> None:
        value = param.get_value()
        param.set_value(jax.tree.map(lambda stack: _moved(stack, positions, model.mesh), value))

    model.moe_blocks.moe.experts.params.map(move)


def _moved(
    stack: Shaped[Array, "L E *_"], positions: Sequence[Sequence[int]], mesh: Mesh | None
) -> Shaped[Array, "L E *_"]:
    """Base experts at other places of their layers' stacks; the array is donated if they move."""
    order = np.argsort(np.asarray(positions), axis=1)
    if (order == np.arange(order.shape[1])).all():
        return stack
    sources = jnp.asarray(order)
    if mesh is None:

        def take(layer: Array, stack: Array) -> Array:
            return _set(stack, layer, to_device(stack[layer])[sources[layer]])

        alone = jax.jit(lambda s: jax.lax.fori_loop(0, len(s), take, s), donate_argnums=0)
        return alone(stack)

    def move(stack: Array) -> Array:
        # One layer at a time: no device holds more than one whole layer beside its part of all.
        def move_layer(layer: Array, stack: Array) -> Array:
            local = stack.shape[1]
            experts = jax.lax.all_gather(to_device(stack[layer]), EXPERT, tiled=True)
            mine = jax.lax.dynamic_slice_in_dim(
                sources[layer], jax.lax.axis_index(EXPERT) * local, local
            )
            return _set(stack, layer, experts[mine])

        return jax.lax.fori_loop(0, len(stack), move_layer, stack)

    spec = PartitionSpec(None, RULES.experts)
    split = jax.shard_map(move, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(split, donate_argnums=0)(stack)


def _set(stack: Array, layer: Array, values: Array) -> Array:
    """The stack with other values in a layer, in the memory that it is in."""
    return jax.lax.dynamic_update_index_in_dim(stack, to_memory_of(values, stack), layer, 0)
