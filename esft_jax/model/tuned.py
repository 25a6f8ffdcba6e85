"""The tuned bank: the selected experts as parameters of their own.

Optimizers label whole leaves, and all experts of a layer share one leaf. Training a few of them
inside that leaf would still allocate gradients and moments for all (`docs/design.md`). So the
selected experts are copied into one flat bank, one row per selected (layer, expert), which is all
that a run differentiates, keeps moments for, and saves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from esft_jax.experts.placement import Placement, place_experts
from esft_jax.mesh import DATA, EXPERT, REPLICA, RULES
from esft_jax.model.params import Role
from esft_jax.ops.grouped_matmul import Bank


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

    @classmethod
    def place(
        cls,
        selected: tuple[tuple[int, ...], ...],
        num_experts: int,
        shards: int,
        loads: Float[np.ndarray, "L E"] | None = None,
    ) -> Self:
        """Layout of experts placed by `place_experts`."""
        placement = place_experts(selected, num_experts, shards, loads)
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
        """Groups that a device with so many base experts computes."""
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

    def layer_window(
        self,
        banks: tuple[Float[Array, "R _ _"], ...],
        carried: "Carried",
        layer: Int[Array, ""],
        shard: Int[Array, ""] | int,
    ) -> tuple[Any, "Carried"]:
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

        (gate_up, next_gate_up), (down, next_down) = map(window, banks, carried)
        groups = jnp.asarray(self.groups)[shard, layer]
        return TunedWindow(gate_up, down, groups), (next_gate_up, next_down)


class TunedWindow(NamedTuple):
    """One layer's tuned experts on one device.

    Attributes:
        gate_up, down: W rows of the bank that contain the layer's own.
        groups: for each expert of the model and the phantom one, what computes its tokens here: a
            row of the window, W + a base expert of the device, or W + all of these for nothing.
    """

    gate_up: Float[Array, "W D F2"] | Bank
    down: Float[Array, "W F D"] | Bank
    groups: Int[Array, " E+1"]


class TunedParam(nnx.Param):
    """A bank of tuned experts."""


class TunedExperts(nnx.Module):
    """The selected experts of all layers: `gate_up [R, D, 2F]`, `down [R, F, D]`."""

    def __init__(self, gate_up: Array, down: Array, layout: TunedLayout):
        split, role = ("experts", None, None), Role.ROUTED_EXPERT
        self.gate_up = TunedParam(gate_up, axes=split, role=role)
        self.down = TunedParam(down, axes=split, role=role)
        self.layout = layout

    @property
    def banks(self) -> tuple[Float[Array, "R D F2"], Float[Array, "R F D"]]:
        """Both, as `TunedLayout.layer_window` takes them."""
        return self.gate_up[...], self.down[...]

    @classmethod
    def from_base(
        cls,
        gate_up: Float[Array, "L E D F2"],
        down: Float[Array, "L E F D"],
        layout: TunedLayout,
        mesh: Mesh | None = None,
    ) -> "TunedExperts":
        """Float32 copies of the selected base experts, on the devices that own them.

        Args:
            gate_up, down: base experts, placed as the layout says.

        Padding rows are zero.
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
            return jnp.where(here[:, None, None], rows, 0)

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
        return cls(copy(gate_up), copy(down), layout)


# A copy of each bank for each of N devices along `data`.
Carried = tuple[Float[Array, "N R _ _"], ...]


def carry_banks(banks: tuple[Float[Array, "R _ _"], ...], mesh: Mesh | None) -> Carried:
    """What a scan over layers carries along so that their gradients add up in place.

    It has the values of the banks, which are read only where they are small. Going backwards it is
    the gradient, to which each layer adds its own rows. If every layer cut its rows out of the bank
    itself, each would make a gradient as large as the bank, and sum it over all expert groups.
    With N of these, each of them has a gradient of its own, and they are summed once.
    """
    copies = 1 if mesh is None else mesh.shape[REPLICA] * mesh.shape[DATA]

    def carry(bank: Array) -> Array:
        carried = jnp.broadcast_to(bank, (copies, *bank.shape))
        if mesh is None:
            return carried
        place = NamedSharding(mesh, PartitionSpec((REPLICA, DATA), RULES.experts))
        return jax.lax.with_sharding_constraint(carried, place)

    return tuple(map(carry, banks))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def take_rows_of(
    carried: Float[Array, "1 R _ _"], start: Int[Array, ""], size: int
) -> tuple[Float[Array, "1 R _ _"], Float[Array, "W _ _"]]:
    """What is carried, unchanged, and W = `size` of its rows; see `carry_banks`."""
    return carried, jax.lax.dynamic_slice_in_dim(carried[0], start, size)


def _take_forward(carried: Array, start: Array, size: int) -> tuple[tuple[Array, Array], Array]:
    return take_rows_of(carried, start, size), start


def _take_backward(size: int, start: Array, grads: tuple[Array, Array]) -> tuple[Array, None]:
    total, own = grads
    before = jax.lax.dynamic_slice_in_dim(total, start, size, axis=1)
    return jax.lax.dynamic_update_slice_in_dim(total, before + own, start, axis=1), None


take_rows_of.defvjp(_take_forward, _take_backward)
