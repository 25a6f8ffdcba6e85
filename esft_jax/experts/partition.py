"""Which parameters are trained: the tuned partition, and the frozen rest."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from esft_jax.experts.expert_config import ExpertConfig
from esft_jax.mesh import EXPERT, RULES
from esft_jax.model.transformer import Transformer
from esft_jax.model.tuned import TunedExperts, TunedLayout

Path = tuple[Any, ...]
TUNED, FROZEN = "tuned", "frozen"


def attach_tuned_experts(
    model: Transformer, experts: ExpertConfig, loads: Float[np.ndarray, "L E"] | None = None
) -> None:
    """Give the model a tuned bank: float32 copies of the selected experts.

    From here on the model computes these experts from the bank; the base ones keep their values.
    Without any selected expert (only shared or other modules are trained) there is no bank.

    Args:
        loads: share of each MoE layer's tokens that each expert is expected to get. With it, base
            experts move between devices, so that all compute about as many (`placement.py`).
    """
    config = model.config
    experts.validate(config.moe_layers, config.router.num_experts)
    if not experts.num_experts_selected:
        return
    shards = 1 if model.mesh is None else model.mesh.shape[EXPERT]
    layout = TunedLayout.from_experts(
        experts.experts, config.moe_layers, config.router.num_experts, shards, loads
    )
    base = model.moe_blocks.moe.experts
    if loads is not None and model.mesh is not None:
        for param in (base.gate_up, base.down):
            param.set_value(_moved(param[...], layout.placement.positions, model.mesh))
    model.tuned_experts = TunedExperts.from_base(
        base.gate_up[...], base.down[...], layout, model.mesh
    )


def _moved(
    stack: Float[Array, "L E _ _"], positions: Sequence[Sequence[int]], mesh: Mesh
) -> Float[Array, "L E _ _"]:
    """Base experts at other places of their layers' stacks; the array is donated."""
    sources = jnp.asarray(np.argsort(np.asarray(positions), axis=1))

    def move(stack: Array) -> Array:
        # One layer at a time: no device holds more than one whole layer beside its part of all.
        def move_layer(layer: Array, stack: Array) -> Array:
            local = stack.shape[1]
            experts = jax.lax.all_gather(stack[layer], EXPERT, tiled=True)
            mine = jax.lax.dynamic_slice_in_dim(
                sources[layer], jax.lax.axis_index(EXPERT) * local, local
            )
            return stack.at[layer].set(experts[mine])

        return jax.lax.fori_loop(0, len(stack), move_layer, stack)

    spec = PartitionSpec(None, RULES.experts)
    split = jax.shard_map(move, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(split, donate_argnums=0)(stack)


def label(path: Path, experts: ExpertConfig | None) -> str:
    """`tuned` or `frozen` for the parameter at a path of the model.

    Args:
        experts: what `esft` trains; None for full fine-tuning, which trains everything.
    """
    if experts is None or "tuned_experts" in path:
        return TUNED
    if "experts" in path:
        return FROZEN
    trained = experts.shared_experts if "shared_experts" in path else experts.non_expert_modules
    return TUNED if trained else FROZEN


def partition(
    model: Transformer, experts: ExpertConfig | None
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Split a model into structure, tuned parameters (float32 masters) and frozen ones."""

    def is_tuned(path: Path, value: Any) -> bool:
        return label(path, experts) == TUNED

    graph, tuned, *rest = nnx.split(model, is_tuned, ...)
    return graph, jax.tree.map(lambda p: p.astype(jnp.float32), tuned), rest[0]


def is_scale(path: Path) -> bool:
    """Whether a parameter is a norm's scale, which weight decay leaves alone."""
    return "scale" in path


def map_by_path(state: nnx.State, function: Callable[[Path], Any]) -> nnx.State:
    """The same state with each value replaced by a function of its path."""
    return nnx.map_state(lambda path, variable: variable.replace(function(path)), state)
