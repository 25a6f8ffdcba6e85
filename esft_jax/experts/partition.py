"""Which parameters are trained: the tuned partition, and the frozen rest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from esft_jax.experts.expert_config import ExpertConfig
from esft_jax.mesh import EXPERT
from esft_jax.model.transformer import Transformer
from esft_jax.model.tuned import TunedExperts, TunedLayout

Path = tuple[Any, ...]
TUNED, FROZEN = "tuned", "frozen"


def attach_tuned_experts(model: Transformer, experts: ExpertConfig) -> None:
    """Give the model a tuned bank: float32 copies of the selected experts.

    From here on the model computes these experts from the bank; the base ones stay as they are.
    Without any selected expert (only shared or other modules are trained) there is no bank.
    """
    config = model.config
    experts.validate(config.moe_layers, config.router.num_experts)
    if not experts.num_experts_selected:
        return
    shards = 1 if model.mesh is None else model.mesh.shape[EXPERT]
    layout = TunedLayout.from_experts(
        experts.experts, config.moe_layers, config.router.num_experts, shards
    )
    base = model.moe_blocks.moe.experts
    model.tuned_experts = TunedExperts.from_base(
        base.gate_up[...], base.down[...], layout, model.mesh
    )


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
