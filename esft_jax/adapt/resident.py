"""Resident adapters: the tuned experts of several adapters, side by side in one model.

Every row of a batch meets the experts of its own adapter. To the layers, these are more experts:
those of the base, and again E for each adapter. A table says which row of the bank, or which expert
of the base, each of them is. The table is data, as the bank is, so that one adapter is exchanged
for another without compiling again.

Letters: A adapters, S devices that experts are split over, L MoE layers, E experts of a layer, E1 =
E + 1 with the phantom one, X = (A + 1) E1 experts of the base and of every adapter, R rows of the
bank on all devices, B rows of the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Int, Int32

from esft_jax.adapt.placement import place_experts
from esft_jax.errors import InputError
from esft_jax.model.params import Role
from esft_jax.moe.grouped_matmul import Bank
from esft_jax.moe.weights import ExpertWeights, TunedWindow
from esft_jax.sharding import EXPERT, RULES

# The adapter id of the base alone.
BASE = -1

Selected = Sequence[Sequence[int]]
"""For every MoE layer, the ids of an adapter's experts in ascending order."""


@dataclass(frozen=True)
class ResidentLayout:
    """Where adapters lie in the bank; which of their experts are there is in the table.

    Attributes:
        rooms: rows of each adapter on a device, one adapter after the other.
        num_layers, num_experts: MoE layers, and experts of each.
        shards: devices along the `expert` mesh axis.
    """

    rooms: tuple[int, ...]
    num_layers: int
    num_experts: int
    shards: int

    first_layer = 0

    @property
    def rows_per_shard(self) -> int:
        """Bank rows of each device."""
        return sum(self.rooms)

    def groups_per_device(self, local: int) -> int:
        """Groups that a device with this number of base experts computes."""
        return self.rows_per_shard + local

    def room(self, adapter_id: int) -> int:
        """Experts that there is room for, in the place of an adapter."""
        return self.rooms[adapter_id] * self.shards

    def rows(self, adapter_id: int, selected: Selected) -> dict[tuple[int, int], int]:
        """The row of the bank for each (index among the MoE layers, expert id) of an adapter.

        Experts are dealt out to the devices as those of `TunedLayout` are.

        Raises:
            InputError: there is no room for them.
        """
        if (count := sum(map(len, selected))) > self.room(adapter_id):
            raise InputError(
                f"{count} experts; adapter {adapter_id} has room for {self.room(adapter_id)}"
            )
        begin = sum(self.rooms[:adapter_id])
        following = [shard * self.rows_per_shard + begin for shard in range(self.shards)]
        owners = place_experts(selected, self.num_experts, self.shards).owners
        found = {}
        for layer, ids in enumerate(selected):
            for expert, shard in zip(ids, owners[layer], strict=True):
                found[layer, expert] = following[shard]
                following[shard] += 1
        return found

    def table(self, rows: dict[tuple[int, int], int]) -> Int32[np.ndarray, "S L E1"]:
        """What computes an adapter's experts on each device, the others being those of the base.

        A row of the device; or, past those, a base expert of the device; or, past these, nothing,
        as for the phantom expert E.
        """
        local = self.num_experts // self.shards
        nothing = self.groups_per_device(local)
        found = np.full((self.shards, self.num_layers, self.num_experts + 1), nothing, np.int32)
        experts = np.arange(self.num_experts)
        found[experts // local, :, experts] = (self.rows_per_shard + experts % local)[:, None]
        for (layer, expert), row in rows.items():
            shard, within = divmod(row, self.rows_per_shard)
            found[:, layer, expert] = nothing
            found[shard, layer, expert] = within
        return found

    def all_groups(
        self, banks: "ResidentBanks", layer: Int[Array, ""] | int
    ) -> Int[Array, "shards X"]:
        """What computes the experts of a layer on every device; inside `shard_map`."""
        return jax.lax.all_gather(banks.table[0, layer], EXPERT)

    def layer_window(
        self, banks: "ResidentBanks", carried: None, layer: Int[Array, ""] | int, shard: object
    ) -> tuple[TunedWindow, None]:
        """A device's rows, of which the table's groups are a layer's; nothing is carried on."""
        rows = banks.weights.map(lambda bank: Bank(bank, 0, self.rows_per_shard))
        return TunedWindow(rows, banks.table[0, layer]), None

    def of_adapters(
        self, expert_ids: Int[Array, "B S K"], adapter_ids: Int[Array, " B"]
    ) -> Int[Array, "B S K"]:
        """The experts of each row, as those of its adapter."""
        return expert_ids + (adapter_ids[:, None, None] + 1) * (self.num_experts + 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ResidentBanks:
    """What `ResidentLayout.layer_window` reads.

    Attributes:
        weights: of the experts of all adapters, `[R, ...]`.
        table: what computes the experts of the base and of every adapter on each device.
    """

    weights: ExpertWeights
    table: Int32[Array, "S L X"]


class AdapterTable(nnx.Variable):
    """Numbers that say which adapter has what, and which one is meant."""


class ResidentExperts(nnx.Module):
    """The tuned experts of several adapters.

    `gate_up [R, D, 2F]`, `down [R, F, D]`, and `gate_up_bias [R, 2F]`, `down_bias [R, D]` of models
    whose experts have biases.

    Attributes:
        table: int32 `[S, L, X]`.
        default: the adapter of all rows, where a call of the model names none.
        layout: what rows and table are of.
    """

    def __init__(
        self, base: ExpertWeights, dtype: DTypeLike, layout: ResidentLayout, mesh: Mesh | None
    ):
        """Room for adapters; all of them are the base at first.

        Args:
            base: the experts of all layers, `[L, E, ...]`.
            dtype: of the bank.
        """
        rows = layout.rows_per_shard * layout.shards
        split = _sharding(mesh, PartitionSpec(RULES.experts))
        for name, stack in base._asdict().items():
            if stack is not None:
                shape = (rows, *stack.shape[2:])
                empty = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=split)()
                axes = ("experts", *[None] * (len(shape) - 1))
                setattr(self, name, nnx.Param(empty, axes=axes, role=Role.ROUTED_EXPERT))
        table = np.tile(layout.table({}), len(layout.rooms) + 1)
        self.table = AdapterTable(jax.device_put(table, split))
        self.default = AdapterTable(
            jax.device_put(np.int32(BASE), _sharding(mesh, PartitionSpec()))
        )
        self.layout = layout

    @property
    def banks(self) -> ResidentBanks:
        """What layers read."""
        weights = ExpertWeights.held_by(self).map(lambda param: param[...])
        return ResidentBanks(weights, self.table[...])

    @property
    def default_id(self) -> Int[Array, ""]:
        """The adapter of all rows, where a call of the model names none."""
        return self.default[...]

    def set_table(self, adapter_id: int, rows: dict[tuple[int, int], int]) -> None:
        """From here on, an adapter has these experts (see `ResidentLayout.rows`)."""
        width = self.layout.num_experts + 1
        begin = (adapter_id + 1) * width
        own, old = self.layout.table(rows), self.table.get_value()
        put = jax.jit(
            lambda table, own: table.at[:, :, begin : begin + width].set(own),
            out_shardings=old.sharding,
        )
        self.table.set_value(put(old, own))

    def set_default(self, adapter_id: int) -> None:
        """From here on, rows are of this adapter, where a call of the model names none."""
        old = self.default.get_value()
        self.default.set_value(jax.device_put(np.int32(adapter_id), old.sharding))


def _sharding(mesh: Mesh | None, spec: PartitionSpec) -> NamedSharding | SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0]) if mesh is None else NamedSharding(mesh, spec)
