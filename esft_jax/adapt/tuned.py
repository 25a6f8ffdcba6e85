"""The tuned bank: the selected experts as parameters of their own.

Optimizers label whole leaves, and all experts of a layer share one leaf. Training a few of them
inside that leaf would still allocate gradients and moments for all (`docs/design.md`). So the
selected experts are copied into one flat bank, one row per selected (layer, expert), which is all
that a run differentiates, keeps moments for, and saves.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array

from esft_jax.adapt.slots import TunedLayout
from esft_jax.model.params import Role
from esft_jax.moe.weights import ExpertWeights
from esft_jax.sharding import EXPERT, RULES


class TunedParam(nnx.Param):
    """A bank of tuned experts."""


def in_bank(param: nnx.Variable) -> bool:
    """Whether a parameter is a bank beside the base experts: of tuned experts, or of factors."""
    beside = isinstance(param, TunedParam | nnx.LoRAParam)
    return beside and param.role is Role.ROUTED_EXPERT


class TunedExperts(nnx.Module):
    """The selected experts of all layers: `gate_up [R, D, 2F]`, `down [R, F, D]`, and `gate_up_bias
    [R, 2F]`, `down_bias [R, D]` of those that have biases.
    """

    def __init__(self, banks: ExpertWeights, layout: TunedLayout):
        for name, bank in banks._asdict().items():
            if bank is not None:
                axes = ("experts", *[None] * (bank.ndim - 1))
                setattr(self, name, TunedParam(bank, axes=axes, role=Role.ROUTED_EXPERT))
        self.layout = layout

    @property
    def banks(self) -> ExpertWeights:
        """All of them, as `TunedLayout.layer_window` takes them."""
        return ExpertWeights.held_by(self).map(lambda param: param[...])

    @classmethod
    def from_base(
        cls, base: ExpertWeights, layout: TunedLayout, mesh: Mesh | None = None
    ) -> "TunedExperts":
        """Float32 copies of the selected base experts, on the devices that own them.

        Padding rows are zero.

        Args:
            base: those of all layers, `[L, E, ...]`, placed as the layout says.
        """
        # Source of each row: layer, place in its stack, and whether there is one.
        sources = np.zeros((layout.shards * layout.rows_per_shard, 3), np.int32)
        for layer, expert, row in layout.rows():
            sources[row] = layer, layout.placement.positions[layer][expert], 1
        source = jnp.asarray(sources)

        def read(bank: Array, source: Array, shard: Array | int) -> Array:
            layers, experts, filled = source.T
            experts = experts - shard * bank.shape[1]
            here = (filled > 0) & (experts >= 0) & (experts < bank.shape[1])
            rows = bank[layers, jnp.where(here, experts, 0)]
            return jnp.where(here.reshape(-1, *[1] * (rows.ndim - 1)), rows, 0)

        def deal_out(bank: Array, source: Array) -> Array:
            # One row for each device at a time: all together would take as much memory on each of
            # them as the whole bank.
            def next_row(_: None, wanted: Array) -> tuple[None, Array]:
                rows = read(bank, wanted, jax.lax.axis_index(EXPERT))
                own = jax.lax.psum_scatter(rows, EXPERT, tiled=True)
                return None, own[0].astype(jnp.float32)

            by_turn = source.reshape(layout.shards, -1, 3).swapaxes(0, 1)
            return jax.lax.scan(next_row, None, by_turn)[1]

        if layout.shards == 1:
            copy = jax.jit(lambda bank: read(bank, source, 0).astype(jnp.float32))
        else:
            assert mesh is not None
            copy = jax.jit(
                jax.shard_map(
                    lambda bank: deal_out(bank, source),
                    mesh=mesh,
                    in_specs=PartitionSpec(None, RULES.experts),
                    out_specs=PartitionSpec(RULES.experts),
                    check_vma=False,
                )
            )
        return cls(base.map(copy), layout)
