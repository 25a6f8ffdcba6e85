"""The routed experts of a device, applied to the tokens that chose them.

Letters: T tokens, K experts per token, N = T * K assignments, M of them, G groups, D model width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax.struct import dataclass, field
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from esft_jax.moe.dispatch import (
    Dispatch,
    add_to_tokens,
    combine,
    piece_of,
    sort_by_group,
    take_rows,
)
from esft_jax.moe.weights import ExpertWeights, GroupWeights, LowRankWindow, TunedWindow
from esft_jax.ops.activation import Activation

# Name of the product of a token's rows with their experts' `gate_up`, for rematerialisation.
GATE_UP = "gate_up"


def apply_experts(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    base: ExpertWeights,
    window: TunedWindow | LowRankWindow | None,
    activation: Activation,
    first: Int[Array, ""] | int = 0,
    piece: int | None = None,
) -> Float[Array, "T D"]:
    """Gate-weighted sum of the experts of each token that are computed here.

    Args:
        expert_ids: E of them, or none (the phantom id), for each token.
        base: the base experts of this device, `first` and following; arrays or `Bank`s.
        window: experts that are taken from it, and not from the base, or whose base is updated; and
            where the others are.
        activation: how gate and up meet.
        piece: assignments that are computed at once, where most belong to other devices: as many
            pieces run as it takes, and nothing is as long as all assignments but indices.
    """
    local = len(base.down)
    weights = GroupWeights.of(base, window, activation)
    if window is None:
        here = (expert_ids >= first) & (expert_ids < first + local)
        groups = jnp.where(here, expert_ids - first, local)
    else:
        groups = window.groups[expert_ids]
    dispatch = sort_by_group(groups, weights.num_groups)
    flat = gates.reshape(-1).astype(x.dtype)
    if piece is not None:
        return _in_pieces(piece, x, flat, weights, dispatch)
    # Of all that is as long as the assignments, only the first product outlives the forward pass;
    # gathers and element-wise work are cheaper to repeat than to keep. What comes from the memory
    # of the host is moved in there, so that the backward pass moves it again.
    at_once = jax.checkpoint(
        # A new function each time: JAX keeps what it has traced by function, and with it which
        # operands an earlier program has differentiated.
        partial(_at_once),
        policy=jax.checkpoint_policies.save_only_these_names(GATE_UP),
        prevent_cse=False,
    )
    return at_once(x, flat, weights, dispatch)


def apply_to_rows(
    rows: Float[Array, "M D"],
    gates: Float[Array, " M"],
    weights: GroupWeights,
    group_sizes: Int[Array, " G"],
) -> Float[Array, "M D"]:
    """For each of the sorted rows, its expert's output times its gate."""
    both = checkpoint_name(weights.multiply(rows, "gate_up", group_sizes), GATE_UP)
    both = weights.add_bias(both, "gate_up", group_sizes)
    # The gates meet the narrow side of `down`, and its bias, so that their gradient needs no row of
    # its result.
    narrow = weights.activation(both) * gates[:, None]
    out = weights.multiply(narrow, "down", group_sizes)
    return weights.add_bias(out, "down", group_sizes, gates)


def _at_once(
    x: Float[Array, "T D"],
    gates: Float[Array, " N"],
    weights: GroupWeights,
    dispatch: Dispatch,
) -> Float[Array, "T D"]:
    """The sum over each token's assignments, all of them at once."""
    weights = weights.on_device()
    rows, gates = take_rows(x, dispatch), take_rows(gates, dispatch)
    rows = apply_to_rows(rows, gates, weights, dispatch.group_sizes)
    return combine(rows, dispatch, len(x))


def filled(differentiated: tuple, operands: tuple) -> tuple:
    """Operands, where they are not differentiated themselves."""
    return jax.tree.map(
        lambda own, given: given if own is None else own,
        differentiated,
        operands,
        is_leaf=lambda leaf: leaf is None,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_pieces(
    piece: int,
    x: Float[Array, "T D"],
    gates: Float[Array, " N"],
    weights: GroupWeights,
    dispatch: Dispatch,
) -> Float[Array, "T D"]:
    """The sum over each token's assignments, a piece of the sorted ones at a time.

    The backward pass computes a piece again: nothing that is wide is kept.
    """
    top_k, weights = gates.size // len(x), weights.on_device()

    def add_piece(i: Array, out: Array) -> Array:
        order, sizes = piece_of(dispatch, i, piece)
        rows = apply_to_rows(x[order // top_k], gates[order], weights, sizes)
        return add_to_tokens(out, rows, dispatch.place - i * piece)

    out = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.fori_loop(0, _pieces(dispatch, piece), add_piece, out).astype(x.dtype)


def _pieces(dispatch: Dispatch, piece: int) -> Int[Array, ""]:
    return -(-dispatch.group_sizes.sum() // piece)


@dataclass
class Needed:
    """Trace-time facts for the backward rule: whether `x`, `gates` and `weights` are
    differentiated.

    The same tree as theirs, of flags; `of` keeps what is differentiated of one, and None elsewhere.
    """

    flags: tuple = field(pytree_node=False)

    @classmethod
    def read(cls, *operands: Any) -> tuple[tuple, "Needed"]:
        """The values of a forward rule's operands, and which of the first three are needed."""

        def each(read: Callable[[CustomVJPPrimal], Any], tree: Any) -> Any:
            return jax.tree.map(read, tree, is_leaf=lambda leaf: isinstance(leaf, CustomVJPPrimal))

        values = each(lambda leaf: leaf.value, operands)
        return values, cls(each(lambda leaf: leaf.perturbed, operands[:3]))

    def of(self, *operands: Array | GroupWeights) -> tuple:
        """What is differentiated of the operands; None elsewhere."""
        return jax.tree.map(lambda value, flag: value if flag else None, operands, self.flags)


def _forward(
    piece: int,
    x: CustomVJPPrimal,
    gates: CustomVJPPrimal,
    weights: Any,
    dispatch: Any,
) -> tuple[Array, tuple]:
    # The leaves of `weights` and `dispatch` are `CustomVJPPrimal`s, too.
    values, needed = Needed.read(x, gates, weights, dispatch)
    return _in_pieces(piece, *values), (*values, needed)


def _backward(piece: int, residuals: tuple, grad: Float[Array, "T D"]) -> tuple:
    x, gates, weights, dispatch, needed = residuals
    top_k, weights = gates.size // len(x), weights.on_device()

    def add_piece(i: Array, sums: tuple) -> tuple:
        order, sizes = piece_of(dispatch, i, piece)
        tokens = order // top_k
        operands = (x[tokens], gates[order], weights)

        def apply(*differentiated: Any) -> Array:
            rows, row_gates, all_weights = filled(differentiated, operands)
            return apply_to_rows(rows, row_gates, all_weights, sizes)

        _, pull = jax.vjp(apply, *needed.of(*operands))
        # Padding rows are 0, and so are their gradients.
        drows, drow_gates, dweights = pull(grad[tokens])
        dx, dgates, dweights_before = sums
        if drows is not None:
            dx = add_to_tokens(dx, drows, dispatch.place - i * piece)
        if drow_gates is not None:
            dgates = dgates.at[order].add(drow_gates)
        return dx, dgates, jax.tree.map(jnp.add, dweights_before, dweights)

    zeros = jax.tree.map(jnp.zeros_like, needed.of(x.astype(jnp.float32), gates, weights))
    dx, *others = jax.lax.fori_loop(0, _pieces(dispatch, piece), add_piece, zeros)
    return None if dx is None else dx.astype(x.dtype), *others, None


_in_pieces.defvjp(_forward, _backward, symbolic_zeros=True)
