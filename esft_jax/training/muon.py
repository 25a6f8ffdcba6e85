"""Muon (Keller Jordan, 2024; arXiv 2502.16982), for parameters that are stacks of matrices.

Each matrix is orthogonalised on its own, one after the other, so that no more than a few of them
are in memory beside the updates.

Letters: I and O, the sides of a matrix.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from esft_jax.adapt.partition import is_matrix
from esft_jax.model.params import Role
from esft_jax.sharding import RULES
from esft_jax.training.rounding import is_variable

# Odd polynomials of singular values that take these close to 1 (Keller Jordan), and how often.
_COEFFICIENTS, _ITERATIONS, _ADDED = (3.4445, -4.7750, 2.0315), 5, 1e-8
# Root mean square of an update, which is that of AdamW's: so the same learning rates do.
_RMS = 0.2


class MuonState(NamedTuple):
    """First moments.

    Attributes:
        updates: made so far.
        mu: the moments.
    """

    updates: Int[Array, ""]
    mu: Any


def orthogonalises(param: nnx.Variable) -> bool:
    """Whether Muon updates a parameter: a matrix between two spaces of features.

    Embedding and head are not, for the words are no such space; nor are the taps of a convolution.
    """
    words = param.role in (Role.EMBEDDING, Role.HEAD)
    return is_matrix(param) and not words and "taps" not in param.axes


def scale_by_muon(momentum: float, mesh: Mesh | None) -> optax.GradientTransformation:
    """Orthogonalised momenta (Nesterov's), of parameters that are all matrices.

    Args:
        momentum: decay of the moments.
        mesh: that the parameters lie on.
    """

    def init(params: optax.Params) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(
        grads: optax.Updates, state: MuonState, _: optax.Params | None = None
    ) -> tuple[optax.Updates, MuonState]:
        made = optax.safe_increment(state.updates)
        mu = optax.tree.update_moment(grads, state.mu, momentum, 1)
        ahead = jax.tree.map(
            lambda moment, grad: momentum * moment + (1 - momentum) * grad,
            optax.tree.bias_correction(mu, momentum, optax.safe_increment(made)),
            optax.tree.bias_correction(grads, momentum, made),
        )
        updates = jax.tree.map(partial(_each_matrix, mesh=mesh), ahead, is_leaf=is_variable)
        return updates, MuonState(made, mu)

    return optax.GradientTransformation(init, update)


def _each_matrix(stack: nnx.Variable, mesh: Mesh | None) -> nnx.Variable:
    """All matrices of a stack orthogonalised, those of experts where they lie."""
    value, function = stack.get_value(), _in_turn
    if isinstance(value, optax.MaskedNode):
        return stack
    if mesh is not None and "experts" in stack.axes:
        axes = (RULES.experts if axis == "experts" else None for axis in stack.axes)
        place = PartitionSpec(*axes)
        function = jax.shard_map(
            _in_turn, mesh=mesh, in_specs=place, out_specs=place, check_vma=False
        )
    return stack.replace(function(value))


def _in_turn(stack: Float[Array, "*N I O"]) -> Float[Array, "*N I O"]:
    """Each matrix orthogonalised in its place."""
    matrices = stack.reshape(-1, *stack.shape[-2:])

    def one(i: Array, matrices: Array) -> Array:
        return matrices.at[i].set(_orthogonalised(matrices[i]))

    return jax.lax.fori_loop(0, len(matrices), one, matrices).reshape(stack.shape)


def _orthogonalised(matrix: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """`U V^T` of `U S V^T`, roughly, times a factor for the root mean square."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (jnp.linalg.norm(wide) + _ADDED)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    x *= _RMS * max(matrix.shape) ** 0.5
    return x if wide is matrix else x.T
