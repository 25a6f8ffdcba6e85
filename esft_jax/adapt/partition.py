"""Which parameters are trained: the tuned partition, and the frozen rest."""

import jax
import jax.numpy as jnp
from flax import nnx

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.adapt.tuned import TunedParam
from esft_jax.model.params import Role
from esft_jax.model.transformer import Transformer

TUNED, FROZEN = "tuned", "frozen"


def trains(experts: ExpertConfig, role: Role) -> bool:
    """Whether `esft` trains the base parameters of a role. A selection bias never learns: load
    balancing has set it once.
    """
    match role:
        case Role.ROUTED_EXPERT | Role.SELECTION_BIAS:
            return False
        case Role.SHARED_EXPERT:
            return experts.shared_experts
    return experts.non_expert_modules


def _is_trained(param: nnx.Variable, trained: Trained) -> bool:
    if isinstance(trained, LoRA):
        return isinstance(param, nnx.LoRAParam)
    if trained is None:
        return param.role is not Role.SELECTION_BIAS
    return isinstance(param, TunedParam) or trains(trained, param.role)


def partition(model: Transformer, trained: Trained) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Split a model into structure, tuned parameters (float32 masters) and frozen ones."""
    graph, tuned, *rest = nnx.split(model, lambda _, param: _is_trained(param, trained), ...)
    return graph, jax.tree.map(lambda p: p.astype(jnp.float32), tuned), rest[0]


def decays(state: nnx.State) -> nnx.State:
    """The same state with, for each value, whether weight decay falls on it: not on vectors, which
    are the scales of norms, and biases.
    """

    def is_matrix(param: nnx.Variable) -> bool:
        return len([axis for axis in param.axes if axis != "layers"]) > 1

    return nnx.map_state(lambda _, param: param.replace(is_matrix(param)), state)
