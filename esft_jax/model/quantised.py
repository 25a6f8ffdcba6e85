"""Which weights of a model are kept quantised."""

from collections.abc import Iterator

import jax
from flax import nnx

from esft_jax.errors import InputError
from esft_jax.model.moe import RoutedExperts
from esft_jax.model.params import Role
from esft_jax.model.transformer import Transformer
from esft_jax.ops.quantisation import Quantisation, Scheme
from esft_jax.ops.quantised import Quantised, problem, quantise

# What `rest` names.
REST = frozenset({Role.ATTENTION, Role.DENSE_MLP, Role.SHARED_EXPERT})


def quantise_model(model: Transformer, how: Quantisation, trained: frozenset[str]) -> None:
    """Replace the values of frozen matrices by `Quantised` ones; biases and vectors stay.

    Args:
        trained: roles of what is trained. Of routed experts only copies are trained, so they are
            quantised in any case.

    Raises:
        InputError: a matrix cannot be quantised so.
    """
    for key, scheme, param in _chosen(model, how, trained):
        value, group_size = param.get_value(), how.group_size
        reason = problem(value.shape, scheme)
        if scheme == "fp8":
            if (block := model.config.fp8_block) is None:
                reason = "fp8 keeps what is published so; the model is not in blocks of fp8"
            else:
                _, group_size = block
        if reason:
            raise InputError(f"quantise.{key}: {reason}; expected another scheme, or none")
        param.set_value(quantise(value, scheme, group_size))


def _chosen(
    model: Transformer, how: Quantisation, trained: frozenset[str]
) -> Iterator[tuple[str, Scheme, nnx.Param]]:
    """The matrices to quantise, with the key that says how."""
    for _, module in nnx.iter_modules(model):
        if isinstance(module, RoutedExperts):
            if how.experts is not None:
                yield "experts", how.experts, module.gate_up
                yield "experts", how.experts, module.down
        elif how.rest is not None:
            for name in getattr(module, "matrices", ()):
                param = getattr(module, name)
                if param.role in REST - trained:
                    yield "rest", how.rest, param


def is_quantised(model: Transformer) -> bool:
    """Whether any of the model's weights are."""
    leaves = jax.tree.leaves(nnx.state(model), is_leaf=lambda leaf: isinstance(leaf, Quantised))
    return any(isinstance(leaf, Quantised) for leaf in leaves)
