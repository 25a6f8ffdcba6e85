"""Slots: which row of the banks beside the base experts holds which expert, and on which device.

Letters: L MoE layers, E experts of a layer, E1 = E + 1 with the phantom one, R rows of a bank, W
rows of a layer's window.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from esft_jax.adapt.placement import Placement, place_experts, place_updated_experts
from esft_jax.moe.carry import Carried, take_rows_of
from esft_jax.moe.grouped_matmul import Bank
from esft_jax.moe.weights import ExpertWeights, LowRankWindow, TunedWindow


@dataclass(frozen=True)
class TunedLayout:
    """Which row of the bank holds which expert, and which device that row.

    A device's rows lie layer after layer; where it has one less than others, the last is padding.

    Attributes:
        selected: for every MoE layer, the selected expert ids in ascending order.
        num_experts: routed experts per layer.
        shards: devices along the `expert` mesh axis.
        placement: of tuned and base experts on them.
    """

    selected: tuple[tuple[int, ...], ...]
    num_experts: int
    shards: int
    placement: Placement

    _placed_by = staticmethod(place_experts)

    @classmethod
    def place(
        cls,
        selected: tuple[tuple[int, ...], ...],
        num_experts: int,
        shards: int,
        loads: Float[np.ndarray, "L E"] | None = None,
    ) -> Self:
        """Layout of experts that `_placed_by` places."""
        placement = cls._placed_by(selected, num_experts, shards, loads)
        return cls(selected, num_experts, shards, placement)

    @classmethod
    def from_experts(
        cls,
        experts: Mapping[int, Sequence[int]],
        moe_layers: Sequence[int],
        num_experts: int,
        shards: int,
        loads: Float[np.ndarray, "L E"] | None = None,
    ) -> Self:
        """Layout for expert ids given by decoder layer index; absent layers select none."""
        selected = tuple(tuple(sorted(experts.get(layer, ()))) for layer in moe_layers)
        return cls.place(selected, num_experts, shards, loads)

    @property
    def first_layer(self) -> int:
        """Index among the MoE layers of the lowest one with a tuned expert."""
        return next(i for i, ids in enumerate(self.selected) if ids)

    @cached_property
    def _counts(self) -> np.ndarray:
        """Selected experts by device and layer, `[shards, L]`."""
        counts = np.zeros((self.shards, len(self.selected)), np.int32)
        for layer, owners in enumerate(self.placement.owners):
            for shard in owners:
                counts[shard, layer] += 1
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

    def groups_per_device(self, local: int) -> int:
        """Groups that a device with this number of base experts computes."""
        return self.window + local

    @cached_property
    def groups(self) -> np.ndarray:
        """What computes an expert's tokens on a device: int32 `[shards, L, E + 1]`.

        A row of the layer's window; or, past those, a base expert of the device; or, past these,
        nothing, as for the phantom expert E.
        """
        local = self.num_experts // self.shards
        nothing = self.window + local
        groups = np.full((self.shards, len(self.selected), self.num_experts + 1), nothing, np.int32)
        for layer, positions in enumerate(self.placement.positions):
            for expert, position in enumerate(positions):
                groups[position // local, layer, expert] = self.window + position % local
        for layer, expert, row in self.rows():
            shard, within = divmod(row, self.rows_per_shard)
            groups[:, layer, expert] = nothing
            groups[shard, layer, expert] = within - self.window_starts[shard, layer]
        return groups

    def all_groups(
        self, banks: Any, layer: Int[Array, ""] | int
    ) -> Int[Array | np.ndarray, "shards E1"]:
        """What computes the experts of a layer on every device."""
        return jnp.asarray(self.groups)[:, layer]

    def rows(self) -> list[tuple[int, int, int]]:
        """All (index among the MoE layers, expert id, bank row)."""
        following = [shard * self.rows_per_shard for shard in range(self.shards)]
        found = []
        for layer, ids in enumerate(self.selected):
            for expert, shard in zip(ids, self.placement.owners[layer], strict=True):
                found.append((layer, expert, following[shard]))
                following[shard] += 1
        return found

    def by_row(self) -> list[tuple[int, int] | None]:
        """What every row holds: index among the MoE layers and expert id; None for padding."""
        held: list[tuple[int, int] | None] = [None] * (self.shards * self.rows_per_shard)
        for layer, expert, row in self.rows():
            held[row] = layer, expert
        return held

    @cached_property
    def held(self) -> np.ndarray:
        """The same as one number for each row: int32 `[R]`, -1 for padding."""
        return np.array(
            [-1 if row is None else row[0] * self.num_experts + row[1] for row in self.by_row()],
            np.int32,
        )

    def layer_window(
        self,
        banks: Any,
        carried: Carried,
        layer: Int[Array, ""] | int,
        shard: Int[Array, ""] | int,
    ) -> tuple[Any, Carried]:
        """A layer's window of a device's slice of the banks, and what is carried on.

        The window may contain rows of neighbouring layers; no expert's group is theirs, so they
        meet no token and receive no gradient.

        Args:
            banks: `TunedExperts.banks`.
        """
        start = jnp.asarray(self.window_starts)[shard, layer]

        def window(bank: Array, carried: Array) -> tuple[Bank, Array]:
            carried, own = take_rows_of(carried, start, self.window)
            return Bank(jax.lax.stop_gradient(bank), start, self.window, own), carried

        taken = banks.map(window, carried)
        groups = jnp.asarray(self.groups)[shard, layer]
        return (
            TunedWindow(taken.map(lambda pair: pair[0]), groups),
            taken.map(lambda pair: pair[1]),
        )


class LowRankLayout(TunedLayout):
    """Which row of the banks updates which expert, and which device that row.

    Base matrices and factors meet the same sorted rows, those of an expert on the device of both.
    """

    _placed_by = staticmethod(place_updated_experts)

    def groups_per_device(self, local: int) -> int:
        """Those of the base experts."""
        return local

    @cached_property
    def groups(self) -> np.ndarray:
        """Which base expert of a device computes an expert's tokens: int32 `[shards, L, E + 1]`.

        Past those: nothing, as for the phantom expert E.
        """
        local = self.num_experts // self.shards
        groups = np.full((self.shards, len(self.selected), self.num_experts + 1), local, np.int32)
        for layer, positions in enumerate(self.placement.positions):
            for expert, position in enumerate(positions):
                groups[position // local, layer, expert] = position % local
        return groups

    @cached_property
    def sources(self) -> np.ndarray | None:
        """The group that each row of a layer's window updates: int32 `[shards, L, W]`.

        As many as a device has for rows of other layers: nothing. None if every group is updated,
        by the row of its number.
        """
        local = self.num_experts // self.shards
        sources = np.full((self.shards, len(self.selected), self.window), local, np.int32)
        for layer, expert, row in self.rows():
            shard, within = divmod(row, self.rows_per_shard)
            place = within - self.window_starts[shard, layer]
            sources[shard, layer, place] = self.groups[shard, layer, expert]
        all_in_order = sources.shape[2] == local and (sources == np.arange(local)).all()
        return None if all_in_order else sources

    def layer_window(
        self,
        banks: tuple[Float[Array, "R _ _"], ...],
        carried: Carried,
        layer: Int[Array, ""] | int,
        shard: Int[Array, ""] | int,
    ) -> tuple["LowRankWindow", Carried]:
        """As of the base class; the factors are small and cut out of what is carried.

        Args:
            banks: `LowRankExperts.banks`.
        """
        start = jnp.asarray(self.window_starts)[shard, layer]
        taken = [take_rows_of(bank, start, self.window) for bank in carried]
        carried, own = zip(*taken, strict=True)
        a_gate, b_gate, a_up, b_up, a_down, b_down = own
        nothing = jnp.zeros_like(b_gate)
        diagonal = jnp.block([[b_gate, nothing], [nothing, b_up]])
        gate_up = jnp.concatenate([a_gate, a_up], axis=-1), diagonal
        window = LowRankWindow(
            ExpertWeights(gate_up, (a_down, b_down)),
            jnp.asarray(self.groups)[shard, layer],
            None if self.sources is None else jnp.asarray(self.sources)[shard, layer],
        )
        return window, carried
