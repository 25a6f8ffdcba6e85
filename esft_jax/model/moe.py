"""The Mixture-of-Experts feed-forward layer, dropless, with experts split over devices.

Tokens of one expert group (the devices along the `expert` mesh axis) are gathered, every device
computes its own experts for them, and the results are summed back to the tokens' owners; or tokens
are sent to the devices of their experts only, and results come back (`exchange.py`). Expert weights
never move.
"""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec, use_abstract_mesh
from jaxtyping import Array, Bool, Float, Int

from esft_jax.mesh import DATA, EXPERT, REPLICA, RULES
from esft_jax.model.config import ModelConfig
from esft_jax.model.exchange import Transport, exchange_and_apply, owners_of
from esft_jax.model.experts import (
    BaseExperts,
    LearnedStack,
    RoutedExperts,
    apply_experts,
    base_bank,
)
from esft_jax.model.lora import LowRankExperts
from esft_jax.model.mlp import MLP
from esft_jax.model.params import ParamFactory, Role
from esft_jax.model.router import Router, RouterOutput
from esft_jax.model.tuned import Carried, TunedExperts, TunedLayout

# A device's share of a group's assignments that is computed in one piece, over an even share.
ROOM = 1.25


class MoE(nnx.Module):
    """Router, routed experts and shared experts."""

    def __init__(self, config: ModelConfig, params: ParamFactory):
        self.router = Router(config.hidden_size, config.router, params)
        self.experts = RoutedExperts(config, params)
        size, width = config.hidden_size, config.shared_width
        self.shared_experts = MLP(size, width, params, Role.SHARED_EXPERT) if width else None
        if config.shared_gate:
            self.shared_gate = params.weight((size, 1), ("embed", None), Role.SHARED_EXPERT)
        self.gated = config.shared_gate

    def __call__(
        self,
        x: Float[Array, "B S D"],
        keep: Bool[Array, "B S"],
        layer: Int[Array, ""],
        tuned: TunedExperts | LowRankExperts | None,
        carried: Carried | None,
        mesh: Mesh | None,
        transport: Transport = "all_gather",
    ) -> tuple[Float[Array, "B S D"], RouterOutput, Carried | None]:
        """Apply the layer; tokens not in `keep` meet no routed expert.

        Args:
            layer: this layer's index among the MoE layers, to find its experts.
            carried: of the tuned experts, from layer to layer (`carry_banks`).
        """
        shape = x.shape
        routed = self.router(x.reshape(-1, shape[-1]), keep.reshape(-1), mesh)
        routed = jax.tree.map(lambda a: a.reshape(*shape[:2], -1), routed)
        banks = (self.experts.gate_up.get_value(), self.experts.down.get_value())
        tuned_banks = tuned.banks if tuned else None
        layout = tuned.layout if tuned else None
        apply = partial(_apply_on_shard, layout=layout, transport=transport)
        if mesh is None or mesh.size == 1:
            with nullcontext() if mesh is None else use_abstract_mesh(mesh.abstract_mesh):
                out, carried = apply(
                    *(x, routed.expert_ids, routed.gates, layer, banks, tuned_banks, carried),
                    shards=1,
                )
        else:
            batch, experts = PartitionSpec(RULES.batch), PartitionSpec(RULES.experts)
            base = tuple(map(_partition, banks))
            copies = PartitionSpec((REPLICA, DATA), RULES.experts)
            out, carried = jax.shard_map(
                partial(apply, shards=mesh.shape[EXPERT]),
                mesh=mesh,
                in_specs=(batch, batch, batch, PartitionSpec(), base, experts, copies),
                out_specs=(batch, copies),
                check_vma=False,
            )(x, routed.expert_ids, routed.gates, layer, banks, tuned_banks, carried)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.gated:
                shared *= jax.nn.sigmoid(x @ self.shared_gate[...].astype(x.dtype))
            out = out + shared
        return out, routed, carried


def _partition(experts: BaseExperts) -> Any:
    if isinstance(experts, LearnedStack):
        return LearnedStack._make(map(_partition, experts))
    return PartitionSpec(*[None] * (experts.ndim - 3), RULES.experts)


def _apply_on_shard(
    x: Float[Array, "B S D"],
    expert_ids: Int[Array, "B S K"],
    gates: Float[Array, "B S K"],
    layer: Int[Array, ""],
    base: tuple[BaseExperts, BaseExperts],
    tuned_banks: tuple[Array, ...] | None,
    carried: Carried | None,
    *,
    layout: TunedLayout | None,
    transport: Transport,
    shards: int,
) -> tuple[Float[Array, "B S D"], Carried | None]:
    """One device's part: its own tokens in and out, its own experts for the whole group."""
    shape = x.shape
    x, expert_ids, gates = (a.reshape(-1, a.shape[-1]) for a in (x, expert_ids, gates))
    shard: Array | int = 0 if shards == 1 else jax.lax.axis_index(EXPERT)
    tuned = None
    if tuned_banks is not None and layout is not None and carried is not None:
        tuned, carried = layout.layer_window(tuned_banks, carried, layer, shard)
    gate_up, down = (base_bank(experts, layer) for experts in base)
    if shards > 1 and transport == "ragged_all_to_all":
        owners = owners_of(layout, layer, len(gate_up), shards)
        quota = math.ceil(ROOM * expert_ids.size / shards)
        out = exchange_and_apply(x, expert_ids, gates, gate_up, down, tuned, owners, quota)
        return out.reshape(shape), carried
    if shards > 1:
        x, expert_ids, gates = (
            jax.lax.all_gather(a, EXPERT, tiled=True) for a in (x, expert_ids, gates)
        )
    piece = None if shards == 1 else _piece(expert_ids.size, shards)
    first = shard * len(gate_up)
    out = apply_experts(x, expert_ids, gates, gate_up, down, tuned, first, piece)
    if shards > 1:
        out = jax.lax.psum_scatter(out, EXPERT, tiled=True)
    return out.reshape(shape), carried


def _piece(assignments: int, shards: int) -> int:
    """Assignments that a device computes at once: its even share, and room for an uneven one."""
    return min(assignments, math.ceil(ROOM * assignments / shards))
