"""The routed experts of a layer as a function of plain arrays, dropless, split over devices.

Tokens of one expert group (the devices along the `expert` mesh axis) are gathered, every device
computes its own experts for them, and the results are summed back to the tokens' owners; or tokens
are sent to the devices of their experts only, and results come back (`transport.py`). Weights of
experts never move.

Letters: B rows, S tokens of a row, K experts per token, D model width, E experts.
"""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec, use_abstract_mesh
from jaxtyping import Array, Float, Int

from esft_jax.moe.carry import Carried
from esft_jax.moe.experts import apply_experts
from esft_jax.moe.transport import Transport, exchange_and_apply, owners_of
from esft_jax.moe.weights import (
    Adapted,
    BaseExperts,
    ExpertWeights,
    Layout,
    LearnedStack,
)
from esft_jax.ops.activation import SWIGLU, Activation
from esft_jax.sharding import DATA, EXPERT, REPLICA, RULES

# A device's share of a group's assignments that is computed in one piece, over an even share.
ROOM = 1.25


class Routing(NamedTuple):
    """What a router decided.

    Attributes:
        expert_ids: the experts of each token; E, the phantom expert, for none.
        gates: the factors of their outputs.
    """

    expert_ids: Int[Array, "B S K"]
    gates: Float[Array, "B S K"]


def moe(
    x: Float[Array, "B S D"],
    routing: Routing,
    weights: ExpertWeights,
    *,
    activation: Activation = SWIGLU,
    mesh: Mesh | None = None,
    transport: Transport = "all_gather",
) -> Float[Array, "B S D"]:
    """Gate-weighted sum of each token's experts: `sum_k gate_k down(activation(gate(x), up(x)))`.

    No token is dropped. All operands but `expert_ids` can be differentiated.

    Args:
        x: rows of the batch, split over all devices of the mesh.
        weights: `gate_up [E, D, 2F]` (gate first) and `down [E, F, D]`, and their biases
            `[E, 2F]` and `[E, D]`, if there are some; split by experts over the `expert` axis of
            the mesh.
        activation: how gate and up meet; SwiGLU by default.
        mesh: as `make_mesh` makes it; None for one device.
        transport: how tokens reach the devices of their experts, and come back.
    """
    out, _ = adapted_moe(x, routing, weights, activation, 0, None, None, mesh, transport)
    return out


def adapted_moe(
    x: Float[Array, "B S D"],
    routing: Routing,
    base: ExpertWeights,
    activation: Activation,
    layer: Int[Array, ""] | int,
    adapted: Adapted | None,
    carried: Carried | None,
    mesh: Mesh | None,
    transport: Transport,
) -> tuple[Float[Array, "B S D"], Carried | None]:
    """As `moe`, for one of many layers, some of whose experts are replaced or updated.

    Args:
        base: of this layer, or those of all layers (see `BaseExperts`).
        layer: its index among the MoE layers, to find its experts.
        adapted: what replaces or updates experts.
        carried: of it, from layer to layer (`carry_banks`).

    Returns:
        The sum, and what is carried on.
    """
    apply = partial(
        _apply_on_shard,
        activation=activation,
        layout=adapted.layout if adapted else None,
        transport=transport,
    )
    operands = (x, *routing, layer, base, adapted.banks if adapted else None, carried)
    if mesh is None or mesh.size == 1:
        with nullcontext() if mesh is None else use_abstract_mesh(mesh.abstract_mesh):
            return apply(*operands, shards=1)
    batch, experts = PartitionSpec(RULES.batch), PartitionSpec(RULES.experts)
    copies = PartitionSpec((REPLICA, DATA), RULES.experts)
    return jax.shard_map(
        partial(apply, shards=mesh.shape[EXPERT]),
        mesh=mesh,
        in_specs=(batch, batch, batch, PartitionSpec(), _partitions(base), experts, copies),
        out_specs=(batch, copies),
        check_vma=False,
    )(*operands)


def _partitions(base: ExpertWeights) -> Any:
    own = PartitionSpec(RULES.experts)
    stack = PartitionSpec(None, RULES.experts) if base.stacked else own

    def partition(experts: BaseExperts) -> Any:
        return LearnedStack._make((stack, own)) if isinstance(experts, LearnedStack) else stack

    return base.map(partition)


def _apply_on_shard(
    x: Float[Array, "B S D"],
    expert_ids: Int[Array, "B S K"],
    gates: Float[Array, "B S K"],
    layer: Int[Array, ""] | int,
    base: ExpertWeights,
    banks: Any,
    carried: Carried | None,
    *,
    activation: Activation,
    layout: Layout | None,
    transport: Transport,
    shards: int,
) -> tuple[Float[Array, "B S D"], Carried | None]:
    """One device's part: its own tokens in and out, its own experts for the whole group."""
    shape = x.shape
    x, expert_ids, gates = (a.reshape(-1, a.shape[-1]) for a in (x, expert_ids, gates))
    shard: Array | int = 0 if shards == 1 else jax.lax.axis_index(EXPERT)
    window = None
    if layout is not None:
        window, carried = layout.layer_window(banks, carried, layer, shard)
    own = base.of_layer(layer)
    if shards > 1 and transport == "ragged_all_to_all":
        owners = owners_of(layout, banks, layer, len(own.down), shards)
        quota = math.ceil(ROOM * expert_ids.size / shards)
        out = exchange_and_apply(x, expert_ids, gates, own, window, activation, owners, quota)
        return out.reshape(shape), carried
    if shards > 1:
        x, expert_ids, gates = (
            jax.lax.all_gather(a, EXPERT, tiled=True) for a in (x, expert_ids, gates)
        )
    piece = None if shards == 1 else _piece(expert_ids.size, shards)
    first = shard * len(own.down)
    out = apply_experts(x, expert_ids, gates, own, window, activation, first, piece)
    if shards > 1:
        out = jax.lax.psum_scatter(out, EXPERT, tiled=True)
    return out.reshape(shape), carried


def _piece(assignments: int, shards: int) -> int:
    """Assignments that a device computes at once: its even share, and room for an uneven one."""
    return min(assignments, math.ceil(ROOM * assignments / shards))
