"""The tuned bank: the selected experts as parameters of their own.

Optimizers label whole leaves, and all experts of a layer share one leaf. Training a few of them
inside that leaf would still allocate gradients and moments for all (`docs/design.md`). So the
selected experts are copied into one flat bank, one row per selected (layer, expert), which is all
that a run differentiates, keeps moments for, and saves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from esft_jax.mesh import RULES


@dataclass(frozen=True)
class TunedLayout:
    """Which row of the bank holds which expert.

    Experts are split over `shards` devices in contiguous ranges; each device owns an equal slice
    of the bank with its own experts' rows, layer after layer. Rows beyond a device's own count
    are padding: only the sums over layers are padded, not each layer.

    Attributes:
        selected: for every MoE layer, the selected expert ids in ascending order.
        num_experts: routed experts per layer.
        shards: devices along the `expert` mesh axis.
    """

    selected: tuple[tuple[int, ...], ...]
    num_experts: int
    shards: int

    @classmethod
    def from_experts(
        cls,
        experts: Mapping[int, Sequence[int]],
        moe_layers: Sequence[int],
        num_experts: int,
        shards: int,
    ) -> "TunedLayout":
        """Layout for expert ids given by decoder layer index; absent layers select none."""
        selected = tuple(tuple(sorted(experts.get(layer, ()))) for layer in moe_layers)
        return cls(selected, num_experts, shards)

    @property
    def first_layer(self) -> int:
        """Index among the MoE layers of the lowest one with a tuned expert."""
        return next(i for i, ids in enumerate(self.selected) if ids)

    @cached_property
    def _counts(self) -> np.ndarray:
        """Selected experts by device and layer, `[shards, L]`."""
        local = self.num_experts // self.shards
        counts = np.zeros((self.shards, len(self.selected)), np.int32)
        for layer, ids in enumerate(self.selected):
            for expert in ids:
                counts[expert // local, layer] += 1
        return counts

    @property
    def rows_per_shard(self) -> int:
        """Bank rows that each device owns."""
        return int(self._counts.sum(axis=1).max())

    @property
    def window(self) -> int:
        """Rows that any device needs for any single layer."""
        return int(self._counts.max())

    @cached_property
    def window_starts(self) -> np.ndarray:
        """First row, within a device's slice, of its window for a layer: int32 `[shards, L]`."""
        starts = np.cumsum(self._counts, axis=1) - self._counts
        return np.minimum(starts, self.rows_per_shard - self.window).astype(np.int32)

    @cached_property
    def slots(self) -> np.ndarray:
        """Row within the window, or -1, of each local expert: int32 `[shards, L, E / shards]`."""
        local = self.num_experts // self.shards
        slots = np.full((self.shards, len(self.selected), local), -1, np.int32)
        for layer, expert, row in self.rows():
            shard = expert // local
            within = row - shard * self.rows_per_shard - self.window_starts[shard, layer]
            slots[shard, layer, expert % local] = within
        return slots

    def rows(self) -> list[tuple[int, int, int]]:
        """All (index among the MoE layers, expert id, bank row)."""
        local = self.num_experts // self.shards
        starts = np.cumsum(self._counts, axis=1) - self._counts
        found = []
        for layer, ids in enumerate(self.selected):
            used = [0] * self.shards
            for expert in ids:
                shard = expert // local
                row = shard * self.rows_per_shard + int(starts[shard, layer]) + used[shard]
                used[shard] += 1
                found.append((layer, expert, row))
        return found


class TunedWindow(NamedTuple):
    """One layer's tuned experts on one device.

    Attributes:
        gate_up, down: W rows of the bank that contain the layer's own.
        slots: row of each local expert in them, or -1.
    """

    gate_up: Float[Array, "W D F2"]
    down: Float[Array, "W F D"]
    slots: Int[Array, " E"]


class TunedExperts(nnx.Module):
    """The selected experts of all layers: `gate_up [R, D, 2F]`, `down [R, F, D]`."""

    def __init__(self, gate_up: Array, down: Array, layout: TunedLayout):
        self.gate_up = nnx.Param(gate_up, axes=("experts", None, None))
        self.down = nnx.Param(down, axes=("experts", None, None))
        self.layout = layout

    @classmethod
    def from_base(
        cls,
        gate_up: Float[Array, "L E D F2"],
        down: Float[Array, "L E F D"],
        layout: TunedLayout,
        mesh: Mesh | None = None,
    ) -> "TunedExperts":
        """Float32 copies of the selected base experts, each made on the device that owns it.

        Padding rows are zero.
        """
        local = layout.num_experts // layout.shards
        # Source of each row: layer, expert on its device, and whether there is one.
        source = np.zeros((layout.shards * layout.rows_per_shard, 3), np.int32)
        for layer, expert, row in layout.rows():
            source[row] = layer, expert % local, 1

        def copy(bank: Array, source: Array) -> Array:
            layers, experts, filled = source.T
            rows = bank[layers, experts].astype(jnp.float32)
            return jnp.where(filled[:, None, None] > 0, rows, 0)

        if mesh is not None:
            experts = PartitionSpec(RULES.experts)
            copy = jax.shard_map(
                copy,
                mesh=mesh,
                in_specs=(PartitionSpec(None, RULES.experts), experts),
                out_specs=experts,
            )
        copy = jax.jit(copy)
        return cls(copy(gate_up, source), copy(down, source), layout)


def layer_window(
    gate_up: Float[Array, "R D F2"],
    down: Float[Array, "R F D"],
    layout: TunedLayout,
    layer: Int[Array, ""],
    shard: Int[Array, ""] | int,
) -> TunedWindow:
    """A layer's window of a device's slice of the bank.

    The window may contain rows of neighbouring layers; no slot points to them, so they meet no
    token and receive no gradient.
    """
    start = jnp.asarray(layout.window_starts)[shard, layer]

    def cut(bank: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(bank, start, layout.window)

    return TunedWindow(cut(gate_up), cut(down), jnp.asarray(layout.slots)[shard, layer])
