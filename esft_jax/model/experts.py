"""The routed experts of a layer, applied to the tokens that chose them.

Letters: T tokens, K experts per token, N = T * K assignments, D model width, F expert width.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.struct import dataclass, field
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Float, Int

from esft_jax.model.config import ModelConfig
from esft_jax.model.lora import LowRankWindow, update_rows
from esft_jax.model.mlp import gated_silu
from esft_jax.model.params import ParamFactory, Role
from esft_jax.model.remat import GATE_UP
from esft_jax.model.tuned import TunedWindow
from esft_jax.ops.dispatch import (
    Dispatch,
    add_to_tokens,
    combine,
    piece_of,
    sort_by_group,
    take_rows,
)
from esft_jax.ops.grouped_matmul import Bank, grouped_matmul


class RoutedExperts(nnx.Module):
    """The base experts of a layer: `gate_up [E, D, 2F]` (gate first), `down [E, F, D]`.

    In a scan over layers they are those of all layers, `[L, E, ...]`, or a `LearnedStack`.
    """

    def __init__(self, config: ModelConfig, params: ParamFactory):
        experts, size, width = config.router.num_experts, config.hidden_size, config.expert_width
        split = ("experts", None, None), Role.ROUTED_EXPERT
        self.gate_up = params.weight((experts, size, 2 * width), *split)
        self.down = params.weight((experts, width, size), *split)


class LearnedStack(NamedTuple):
    """A layer's base experts while they are trained: those of all layers, which are read, and the
    layer's own, which are differentiated (`Bank.own`).
    """

    stack: Float[Array, "L E _ _"]
    own: Float[Array, "E _ _"]


# A layer's base experts: alone, or among those of all layers.
BaseExperts = Float[Array, "*L E _ _"] | LearnedStack


def base_bank(experts: BaseExperts, layer: Int[Array, ""]) -> Float[Array, "E _ _"] | Bank:
    """The matrices of a layer."""
    if isinstance(experts, LearnedStack):
        return Bank.layer_of(jax.lax.stop_gradient(experts.stack), layer, experts.own)
    return Bank.layer_of(experts, layer) if experts.ndim == 4 else experts


class Banks(NamedTuple):
    """Matrices of all groups in order: of the tuned experts, if there are any, and of the base; and
    low-rank updates of some of them.
    """

    gate_up: tuple[Float[Array, "_ D F2"] | Bank, ...]
    down: tuple[Float[Array, "_ F D"] | Bank, ...]
    updates: LowRankWindow | None = None

    @classmethod
    def of(
        cls,
        gate_up: Float[Array, "_ D F2"] | Bank,
        down: Float[Array, "_ F D"] | Bank,
        tuned: TunedWindow | LowRankWindow | None,
    ) -> "Banks":
        """Those of a device; see `apply_experts`."""
        if tuned is None or isinstance(tuned, LowRankWindow):
            return cls((gate_up,), (down,), tuned)
        return cls((tuned.gate_up, gate_up), (tuned.down, down))

    def multiply(
        self, rows: Float[Array, "M in"], name: str, group_sizes: Int[Array, " G"]
    ) -> Float[Array, "M out"]:
        """Product of each of the sorted rows with its group's matrix: `gate_up` or `down`."""
        out = grouped_matmul(rows, getattr(self, name), group_sizes)
        if self.updates is None:
            return out
        factors = getattr(self.updates, name)
        return out + update_rows(rows, factors, self.updates.sources, group_sizes)


def apply_experts(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    gate_up: Float[Array, "_ D F2"] | Bank,
    down: Float[Array, "_ F D"] | Bank,
    tuned: TunedWindow | LowRankWindow | None,
    first: Int[Array, ""] | int = 0,
    piece: int | None = None,
) -> Float[Array, "T D"]:
    """Gate-weighted sum of the experts of each token that are computed here.

    Args:
        expert_ids: E of them, or none (the phantom id), for each token.
        gate_up, down: the base experts of this device, `first` and following.
        tuned: experts that are taken from this window, and not from the base, or whose base is
            updated; and where the others are.
        piece: assignments that are computed at once, where most are nobody's here: as many pieces
            run as it takes, and nothing is as long as all assignments but indices.
    """
    local = len(gate_up)
    banks = Banks.of(gate_up, down, tuned)
    if tuned is None:
        here = (expert_ids >= first) & (expert_ids < first + local)
        groups, num_groups = jnp.where(here, expert_ids - first, local), local
    else:
        groups, num_groups = tuned.groups[expert_ids], sum(map(len, banks.gate_up))
    dispatch = sort_by_group(groups, num_groups)
    flat = gates.reshape(-1).astype(x.dtype)
    if piece is not None:
        return _in_pieces(piece, x, flat, banks, dispatch)
    return _at_once(x, flat, banks, dispatch)


def apply_to_rows(
    rows: Float[Array, "M D"],
    gates: Float[Array, " M"],
    banks: Banks,
    group_sizes: Int[Array, " G"],
) -> Float[Array, "M D"]:
    """For each of the sorted rows, its expert's output times its gate."""
    both = checkpoint_name(banks.multiply(rows, "gate_up", group_sizes), GATE_UP)
    # The gates meet the narrow side of `down`, so that their gradient needs no row of its result.
    return banks.multiply(gated_silu(both) * gates[:, None], "down", group_sizes)


# Of all that is as long as the assignments, only the first product outlives the forward pass;
# gathers and element-wise work are cheaper to repeat than to keep.
@partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(GATE_UP),
    prevent_cse=False,
)
def _at_once(
    x: Float[Array, "T D"],
    gates: Float[Array, " N"],
    banks: Banks,
    dispatch: Dispatch,
) -> Float[Array, "T D"]:
    """The sum over each token's assignments, all of them at once."""
    rows, gates = take_rows(x, dispatch), take_rows(gates, dispatch)
    rows = apply_to_rows(rows, gates, banks, dispatch.group_sizes)
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
    banks: Banks,
    dispatch: Dispatch,
) -> Float[Array, "T D"]:
    """The sum over each token's assignments, a piece of the sorted ones at a time.

    The backward pass computes a piece again: nothing that is wide is kept.
    """
    top_k = gates.size // len(x)

    def add_piece(i: Array, out: Array) -> Array:
        order, sizes = piece_of(dispatch, i, piece)
        rows = apply_to_rows(x[order // top_k], gates[order], banks, sizes)
        return add_to_tokens(out, rows, dispatch.place - i * piece)

    out = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.fori_loop(0, _pieces(dispatch, piece), add_piece, out).astype(x.dtype)


def _pieces(dispatch: Dispatch, piece: int) -> Int[Array, ""]:
    return -(-dispatch.group_sizes.sum() // piece)


@dataclass
class Needed:
    """Trace-time facts for the backward rule: which of `x`, `gates` and `banks` are differentiated.

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

    def of(self, *operands: Array | Banks) -> tuple:
        """What is differentiated of the operands; None elsewhere."""
        return jax.tree.map(lambda value, flag: value if flag else None, operands, self.flags)


def _forward(
    piece: int,
    x: CustomVJPPrimal,
    gates: CustomVJPPrimal,
    banks: Banks,
    dispatch: Dispatch,
) -> tuple[Array, tuple]:
    values, needed = Needed.read(x, gates, banks, dispatch)
    return _in_pieces(piece, *values), (*values, needed)


def _backward(piece: int, residuals: tuple, grad: Float[Array, "T D"]) -> tuple:
    x, gates, banks, dispatch, needed = residuals
    top_k = gates.size // len(x)

    def add_piece(i: Array, sums: tuple) -> tuple:
        order, sizes = piece_of(dispatch, i, piece)
        tokens = order // top_k
        operands = (x[tokens], gates[order], banks)

        def apply(*differentiated: Array | Banks | None) -> Array:
            rows, row_gates, all_banks = filled(differentiated, operands)
            return apply_to_rows(rows, row_gates, all_banks, sizes)

        _, pull = jax.vjp(apply, *needed.of(*operands))
        # Rows of nobody are 0, and so are their gradients.
        drows, drow_gates, dbanks = pull(grad[tokens])
        dx, dgates, dbanks_before = sums
        if drows is not None:
            dx = add_to_tokens(dx, drows, dispatch.place - i * piece)
        if drow_gates is not None:
            dgates = dgates.at[order].add(drow_gates)
        return dx, dgates, jax.tree.map(jnp.add, dbanks_before, dbanks)

    zeros = jax.tree.map(jnp.zeros_like, needed.of(x.astype(jnp.float32), gates, banks))
    dx, *others = jax.lax.fori_loop(0, _pieces(dispatch, piece), add_piece, zeros)
    return None if dx is None else dx.astype(x.dtype), *others, None


_in_pieces.defvjp(_forward, _backward, symbolic_zeros=True)
