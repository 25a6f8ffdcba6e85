"""Which parameters are trained: the tuned partition, and the frozen rest."""

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA, Trained
from esft_jax.adapt.parts import check_also, roles_of
from esft_jax.adapt.tuned import TunedParam
from esft_jax.families import tensor_table
from esft_jax.model.config import ModelConfig
from esft_jax.model.params import CONSTANTS, Role
from esft_jax.model.transformer import Transformer

TUNED, FROZEN = "tuned", "frozen"


def check_experts(experts: ExpertConfig, model: ModelConfig) -> None:
    """Check that a model has all that shall be trained.

    Raises:
        InputError: see `ExpertConfig.validate`; or the model has nothing of some part.
    """
    experts.validate(model.moe_layers, model.router.num_experts)
    check_also(experts.also, tensor_table(model).roles, "expert config: also")


def trains(experts: ExpertConfig, role: Role) -> bool:
    """Whether `esft` trains the base parameters of a role."""
    return role in roles_of(experts.also)


def trained_roles(trained: Trained, model: ModelConfig) -> frozenset[str]:
    """The roles of what is trained."""
    present = tensor_table(model).roles
    if trained is None:
        return present - CONSTANTS
    roles = trained.roles if isinstance(trained, LoRA) else roles_of(trained.also)
    experts = trained.experts if isinstance(trained, LoRA) else trained
    if experts.num_experts_selected:
        roles |= {Role.ROUTED_EXPERT}
    return roles & present


def _is_trained(param: nnx.Variable, trained: Trained) -> bool:
    if isinstance(trained, LoRA):
        return isinstance(param, nnx.LoRAParam)
    if trained is None:
        return param.role not in CONSTANTS
    return isinstance(param, TunedParam) or trains(trained, param.role)


def partition(
    model: Transformer, trained: Trained, masters: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Split a model into structure, tuned parameters (masters) and frozen ones.

    Args:
        masters: type of tuned matrices; those of vectors are always float32.
    """
    graph, tuned, *rest = nnx.split(model, lambda _, param: _is_trained(param, trained), ...)

    def master(param: nnx.Variable) -> nnx.Variable:
        value = param.get_value()
        return param.replace(value.astype(masters if is_matrix(param) else jnp.float32))

    return graph, nnx.map_state(lambda _, param: master(param), tuned), rest[0]


def is_matrix(param: nnx.Variable) -> bool:
    """Whether a parameter is a stack of matrices; if not, of vectors: scales of norms, biases."""
    return len([axis for axis in param.axes if axis not in ("layers", "experts")]) > 1


def decays(state: nnx.State) -> nnx.State:
    """The same state with, for each value, whether weight decay falls on it: on matrices alone."""
    return nnx.map_state(lambda _, param: param.replace(is_matrix(param)), state)
