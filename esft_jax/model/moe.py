"""The Mixture-of-Experts feed-forward layer, dropless, with experts split over devices.

Tokens of one expert group (the devices along the `expert` mesh axis) are gathered, every device
computes its own experts for them, and the results are summed back to the tokens' owners. Expert
weights never move.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from esft_jax.mesh import EXPERT, RULES
from esft_jax.model.config import ModelConfig
from esft_jax.model.mlp import MLP, gated_silu
from esft_jax.model.params import ParamFactory
from esft_jax.model.remat import GATE_UP
from esft_jax.model.router import Router, RouterOutput
from esft_jax.model.tuned import TunedExperts, TunedLayout, TunedWindow, layer_window
from esft_jax.ops.dispatch import Dispatch, restore_order, sort_by_group, take_rows
from esft_jax.ops.grouped_matmul import grouped_matmul


class RoutedExperts(nnx.Module):
    """The base experts of a layer: `gate_up [E, D, 2F]` (gate first), `down [E, F, D]`.

    In a scan over layers that does not train them they are those of all layers, `[L, E, ...]`.
    """

    def __init__(self, config: ModelConfig, params: ParamFactory):
        experts, size, width = config.router.num_experts, config.hidden_size, config.expert_width
        self.gate_up = params.weight((experts, size, 2 * width), ("experts", None, None))
        self.down = params.weight((experts, width, size), ("experts", None, None))


def apply_experts(
    x: Float[Array, "T D"],
    expert_ids: Int[Array, "T K"],
    gates: Float[Array, "T K"],
    gate_up: Float[Array, "*L E D F2"],
    down: Float[Array, "*L E F D"],
    layer: Int[Array, ""],
    tuned: TunedWindow | None,
) -> Float[Array, "T D"]:
    """Gate-weighted sum of the experts of each token.

    Ids outside `[0, E)` are nobody here: neither computed nor added. Tuned experts are taken from
    the window, all others from the base bank, or from its entry `layer`.
    """
    num_experts = gate_up.shape[-3]
    here = (expert_ids >= 0) & (expert_ids < num_experts)
    gate_up_banks: tuple[Array, ...] = (gate_up,)
    down_banks: tuple[Array, ...] = (down,)
    if tuned is None:
        groups, num_groups = expert_ids, num_experts
    else:
        window = tuned.gate_up.shape[0]
        slots = tuned.slots[jnp.where(here, expert_ids, 0)]
        groups, num_groups = jnp.where(slots >= 0, slots, window + expert_ids), window + num_experts
        gate_up_banks = (tuned.gate_up, *gate_up_banks)
        down_banks = (tuned.down, *down_banks)
    dispatch = sort_by_group(jnp.where(here, groups, num_groups), num_groups)
    out = _experts_of_rows(
        x, gates.reshape(-1).astype(x.dtype), gate_up_banks, down_banks, dispatch, layer
    )
    return out.reshape(*gates.shape, x.shape[-1]).sum(axis=1, dtype=jnp.float32).astype(x.dtype)


# Of all that is as long as the assignments, only the first product outlives the forward pass;
# gathers and element-wise work are cheaper to repeat than to keep.
@partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(GATE_UP),
    prevent_cse=False,
)
def _experts_of_rows(
    x: Float[Array, "T D"],
    gates: Float[Array, " N"],
    gate_up_banks: tuple[Float[Array, "*L _ D F2"], ...],
    down_banks: tuple[Float[Array, "*L _ F D"], ...],
    dispatch: Dispatch,
    layer: Int[Array, ""],
) -> Float[Array, "N D"]:
    """For each assignment, its expert's output times its gate."""
    rows, sizes = take_rows(x, dispatch), dispatch.group_sizes
    both = checkpoint_name(grouped_matmul(rows, gate_up_banks, sizes, layer), GATE_UP)
    # The gates meet the narrow side of `down`, so that their gradient needs no row of its result.
    hidden = gated_silu(both) * take_rows(gates, dispatch)[:, None]
    return restore_order(grouped_matmul(hidden, down_banks, sizes, layer), dispatch)


class MoE(nnx.Module):
    """Router, routed experts and shared experts."""

    def __init__(self, config: ModelConfig, params: ParamFactory):
        self.router = Router(config.hidden_size, config.router, params)
        self.experts = RoutedExperts(config, params)
        width = config.num_shared_experts * config.expert_width
        self.shared_experts = MLP(config.hidden_size, width, params) if width else None

    def __call__(
        self,
        x: Float[Array, "B S D"],
        keep: Bool[Array, "B S"],
        layer: Int[Array, ""],
        tuned: TunedExperts | None,
        mesh: Mesh | None,
    ) -> tuple[Float[Array, "B S D"], RouterOutput]:
        """Apply the layer; tokens not in `keep` meet no routed expert.

        Args:
            layer: this layer's index among the MoE layers, to find its experts.
        """
        shape = x.shape
        routed = self.router(x.reshape(-1, shape[-1]), keep.reshape(-1))
        routed = jax.tree.map(lambda a: a.reshape(*shape[:2], -1), routed)
        banks = (self.experts.gate_up[...], self.experts.down[...])
        tuned_banks = (tuned.gate_up[...], tuned.down[...]) if tuned else None
        apply = partial(_apply_on_shard, layout=tuned.layout if tuned else None)
        if mesh is None:
            out = apply(x, routed.expert_ids, routed.gates, layer, banks, tuned_banks, shards=1)
        else:
            batch, experts = PartitionSpec(RULES.batch), PartitionSpec(RULES.experts)
            stacked = PartitionSpec(*[None] * (banks[0].ndim - 3), RULES.experts)
            out = jax.shard_map(
                partial(apply, shards=mesh.shape[EXPERT]),
                mesh=mesh,
                in_specs=(batch, batch, batch, PartitionSpec(), stacked, experts),
                out_specs=batch,
                check_vma=False,
            )(x, routed.expert_ids, routed.gates, layer, banks, tuned_banks)
        if self.shared_experts is not None:
            out = out + self.shared_experts(x)
        return out, routed


def _apply_on_shard(
    x: Float[Array, "B S D"],
    expert_ids: Int[Array, "B S K"],
    gates: Float[Array, "B S K"],
    layer: Int[Array, ""],
    banks: tuple[Array, Array],
    tuned_banks: tuple[Array, Array] | None,
    *,
    layout: TunedLayout | None,
    shards: int,
) -> Float[Array, "B S D"]:
    """One device's part: its own tokens in and out, its own experts for the whole group."""
    shape = x.shape
    x, expert_ids, gates = (a.reshape(-1, a.shape[-1]) for a in (x, expert_ids, gates))
    shard: Array | int = 0
    if shards > 1:
        shard = jax.lax.axis_index(EXPERT)
        x, expert_ids, gates = (
            jax.lax.all_gather(a, EXPERT, tiled=True) for a in (x, expert_ids, gates)
        )
        expert_ids = expert_ids - shard * banks[0].shape[-3]
    tuned = None
    if tuned_banks is not None and layout is not None:
        tuned = layer_window(*tuned_banks, layout, layer, shard)
    out = apply_experts(x, expert_ids, gates, *banks, layer, tuned)
    if shards > 1:
        out = jax.lax.psum_scatter(out, EXPERT, tiled=True)
    return out.reshape(shape)
