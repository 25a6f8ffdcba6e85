"""Tokens sent to the devices of their experts, and results sent back.

Letters: T tokens, K experts per token, N = T * K assignments of a device, E1 experts of a layer
with the phantom one, S devices of an expert group, Q assignments that a device sends to each of
them in a round, SQ = S * Q, D model width.

How many assignments a device has for another one is known at run time only. So each sends at most Q
of them at once, from and to buffers with a slot of Q rows per device, in as many rounds as the
busiest pair takes. No assignment is dropped, and no buffer is as long as all of a group's.
"""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Array, Bool, Float, Int, Num

from esft_jax.moe.dispatch import Dispatch, add_to_tokens, combine, sort_by_group, take_rows
from esft_jax.moe.experts import Needed, apply_to_rows, filled
from esft_jax.moe.weights import ExpertWeights, GroupWeights, Layout, LowRankWindow, TunedWindow
from esft_jax.ops.activation import Activation
from esft_jax.ops.platform import target_platform
from esft_jax.sharding import EXPERT, RULES

Transport = Literal["all_gather", "ragged_all_to_all"]


class Owners(NamedTuple):
    """Which device computes an expert of a layer, and as which of its groups.

    Attributes:
        device: along the `expert` axis; S for the phantom expert.
        group: of that device's `GroupWeights`.
        groups: how many of these each device has.
    """

    device: Int[Array, " E1"]
    group: Int[Array, " E1"]
    groups: int


def owners_of(
    layout: Layout | None, banks: Any, layer: Int[Array, ""] | int, local: int, shards: int
) -> Owners:
    """Owners in a layer, of which every device has `local` base experts; inside `shard_map`."""
    if layout is None:
        experts = jnp.arange(local * shards + 1, dtype=jnp.int32)
        return Owners(experts // local, experts % local, local)
    groups = layout.all_groups(banks, layer)
    count = layout.groups_per_device(local)
    group = groups.min(axis=0)
    return Owners(jnp.where(group < count, groups.argmin(axis=0), shards), group, count)


def exchange_and_apply(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    base: ExpertWeights,
    window: TunedWindow | LowRankWindow | None,
    activation: Activation,
    owners: Owners,
    quota: int,
) -> Float[Array, "T D"]:
    """Gate-weighted sum of the experts of each token, wherever they are; inside `shard_map`.

    Args:
        base, window, activation: the experts of this device; see `apply_experts`.
        quota: Q.
    """
    weights = GroupWeights.of(base, window, activation)
    device = owners.device[expert_ids]
    shards = jax.lax.axis_size(EXPERT)
    dispatch = sort_by_group(device, shards)
    route = _Route(dispatch, device.reshape(-1), owners.group[expert_ids].reshape(-1))
    flat = gates.reshape(-1).astype(x.dtype)
    return _in_rounds((quota, owners.groups), x, flat, weights, route)


class _Route(NamedTuple):
    """Where the assignments of this device go.

    Attributes:
        dispatch: sorted by the device that computes them.
        device: of each assignment, S for those that no device computes.
        group: of each assignment, on that device.
    """

    dispatch: Dispatch
    device: Int[Array, " N"]
    group: Int[Array, " N"]


def exchange(
    rows: Num[Array, "SQ *D"], sent: Int[Array, " S"], received: Int[Array, " S"]
) -> Num[Array, "SQ *D"]:
    """Send the first rows of each device's slot to that device; what was not sent arrives as 0.

    Args:
        rows: a slot of Q rows for each device.
        sent: how many of each slot are sent.
        received: how many come from each device.

    Returns:
        A slot of Q rows from each device.
    """
    shards = len(sent)
    quota = len(rows) // shards
    if target_platform() == "cpu":
        # XLA has no ragged exchange for CPUs: whole slots are exchanged, and cut to size.
        slots = rows.reshape(shards, quota, *rows.shape[1:])
        slots = jax.lax.all_to_all(slots, EXPERT, 0, 0)
        here = jnp.arange(quota) < received[:, None]
        here = here.reshape(*here.shape, *[1] * (rows.ndim - 1))
        return jnp.where(here, slots, 0).reshape(rows.shape)
    begins = quota * jnp.arange(shards, dtype=jnp.int32)
    own_slot = jnp.full(shards, quota * jax.lax.axis_index(EXPERT), jnp.int32)
    return jax.lax.ragged_all_to_all(
        rows, jnp.zeros_like(rows), begins, sent, own_slot, received, axis_name=EXPERT
    )


class _Round(NamedTuple):
    """What one round moves.

    Attributes:
        assignment: of this device, in each place of the buffer that is sent.
        held: places that hold one.
        place: of each assignment in the buffer; SQ for those of other rounds, and for
            those that no device computes.
        sent, received: assignments to and from each device.
    """

    assignment: Int[Array, " SQ"]
    held: Bool[Array, " SQ"]
    place: Int[Array, " N"]
    sent: Int[Array, " S"]
    received: Int[Array, " S"]

    def send(self, values: Num[Array, "N *D"] | Num[Array, "T *D"]) -> Num[Array, "SQ *D"]:
        """What arrives here, when every device sends its assignments' values, or their tokens'."""
        taken = values[self.assignment // (len(self.place) // len(values))]
        held = self.held.reshape(-1, *[1] * (values.ndim - 1))
        return exchange(jnp.where(held, taken, 0), self.sent, self.received)

    def send_back(self, values: Num[Array, "SQ *D"]) -> Num[Array, "SQ *D"]:
        """What arrives in the places of the assignments that were sent."""
        return exchange(values, self.received, self.sent)


def _round(route: _Route, index: Array, quota: int) -> _Round:
    dispatch, shards = route.dispatch, len(route.dispatch.group_sizes)
    begins = jnp.cumsum(dispatch.group_sizes) - dispatch.group_sizes + index * quota
    sent = jnp.clip(dispatch.group_sizes - index * quota, 0, quota)
    received = jax.lax.all_to_all(sent, EXPERT, 0, 0, tiled=True)
    within = jnp.arange(quota, dtype=jnp.int32)
    held = within < sent[:, None]
    assignment = dispatch.order[jnp.where(held, begins[:, None] + within, 0)]
    device = jnp.minimum(route.device, shards - 1)
    within = dispatch.place - begins[device]
    here = (route.device < shards) & (within >= 0) & (within < quota)
    place = jnp.where(here, quota * device + within, shards * quota)
    return _Round(assignment.reshape(-1), held.reshape(-1), place, sent, received)


def _rounds(route: _Route, quota: int) -> Int[Array, ""]:
    """As many as the busiest pair takes; the same on all devices, for they exchange in each."""
    own = -(-route.dispatch.group_sizes.max() // quota)
    return jax.lax.pmax(own, RULES.batch)


def _arrived(group: Int[Array, " SQ"], received: Int[Array, " S"], groups: int) -> Dispatch:
    """What arrived, sorted by this device's groups."""
    here = jnp.arange(len(group) // len(received)) < received[:, None]
    return sort_by_group(jnp.where(here.reshape(-1), group, groups)[:, None], groups)


def _results(
    rows: Float[Array, "SQ D"], gates: Float[Array, " SQ"], weights: GroupWeights, arrived: Dispatch
) -> Float[Array, "SQ D"]:
    """Of each row that arrived, its expert's output times its gate."""
    sorted_rows, sorted_gates = take_rows(rows, arrived), take_rows(gates, arrived)
    outputs = apply_to_rows(sorted_rows, sorted_gates, weights, arrived.group_sizes)
    return combine(outputs, arrived, len(rows))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(
    sizes: tuple[int, int],
    x: Float[Array, "T D"],
    gates: Float[Array, " N"],
    weights: GroupWeights,
    route: _Route,
) -> Float[Array, "T D"]:
    """The sum over each token's assignments.

    The backward pass sends and computes a round again: nothing that is wide is kept.

    Args:
        sizes: Q, and the number of groups of each device.
    """
    quota, groups = sizes

    def add_round(i: Array, out: Array) -> Array:
        turn = _round(route, i, quota)
        arrived = _arrived(turn.send(route.group), turn.received, groups)
        results = _results(turn.send(x), turn.send(gates), weights, arrived)
        return add_to_tokens(out, turn.send_back(results), turn.place)

    out = jnp.zeros(x.shape, jnp.float32)
    return jax.lax.fori_loop(0, _rounds(route, quota), add_round, out).astype(x.dtype)


def _forward(
    sizes: tuple[int, int],
    x: CustomVJPPrimal,
    gates: CustomVJPPrimal,
    weights: Any,
    route: Any,
) -> tuple[Array, tuple]:
    # The leaves of `weights` and `route` are `CustomVJPPrimal`s, too.
    values, needed = Needed.read(x, gates, weights, route)
    return _in_rounds(sizes, *values), (*values, needed)


def _backward(sizes: tuple[int, int], residuals: tuple, grad: Float[Array, "T D"]) -> tuple:
    x, gates, weights, route, needed = residuals
    quota, groups = sizes

    def add_round(i: Array, sums: tuple) -> tuple:
        turn = _round(route, i, quota)
        arrived = _arrived(turn.send(route.group), turn.received, groups)
        operands = (turn.send(x), turn.send(gates), weights)

        def apply(*differentiated: Any) -> Array:
            rows, row_gates, all_weights = filled(differentiated, operands)
            return _results(rows, row_gates, all_weights, arrived)

        _, pull = jax.vjp(apply, *needed.of(*operands))
        drows, drow_gates, dweights = pull(turn.send(grad))
        dx, dgates, dweights_before = sums
        if drows is not None:
            dx = add_to_tokens(dx, turn.send_back(drows), turn.place)
        if drow_gates is not None:
            # Empty places get 0 back.
            dgates = dgates.at[turn.assignment].add(turn.send_back(drow_gates))
        return dx, dgates, jax.tree.map(jnp.add, dweights_before, dweights)

    zeros = jax.tree.map(jnp.zeros_like, needed.of(x.astype(jnp.float32), gates, weights))
    dx, *others = jax.lax.fori_loop(0, _rounds(route, quota), add_round, zeros)
    return None if dx is None else dx.astype(x.dtype), *others, None


_in_rounds.defvjp(_forward, _backward, symbolic_zeros=True)
