"""Low-rank updates of frozen matrices (LoRA, arXiv 2106.09685): `x W + scale (x A) B`.

Factors of attention and feed-forward layers lie in the modules whose weights they update, stacked
by layer like these. Those of routed experts are banks beside the model, one row per updated (layer,
expert), like tuned experts (`tuned.py`).
"""

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int

from esft_jax.experts.placement import place_updated_experts
from esft_jax.mesh import RULES
from esft_jax.model.params import Role
from esft_jax.model.tuned import Carried, TunedLayout, take_rows_of
from esft_jax.ops.grouped_matmul import grouped_matmul


class LowRank(nnx.Module):
    """The factors of one matrix in every layer, or of one in every row of a bank.

    Attributes:
        a: `[L, in, r]`, float32.
        b: `[L, r, out]`, float32.
        scale: factor on their product.
    """

    def __init__(self, a: nnx.LoRAParam, b: nnx.LoRAParam, scale: float):
        self.a, self.b, self.scale = a, b, scale

    @classmethod
    def of(
        cls,
        weight: nnx.Param,
        columns: int,
        rank: int,
        scale: float,
        key: jax.Array,
        mesh: Mesh | None,
    ) -> "LowRank":
        """New factors of a stacked weight `[L, in, out]`, or of as many columns of it; see `draw`.

        Sides of the weight that are split over devices are split in the factors, too.
        """
        layers, width, _ = weight.get_value().shape
        stack, side_in, side_out = weight.axes
        shape, axes = (layers, width, rank), (stack, side_in, None)
        a = _made(lambda: _uniform(key, shape), axes, weight.role, shape, mesh)
        shape, axes = (layers, rank, columns), (stack, None, side_out)
        b = _made(lambda: jnp.zeros(shape), axes, weight.role, shape, mesh)
        return cls(a, b, scale)

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        """The update of a product, in the type of `x`; of one layer, inside the scan over them."""
        return self.scale * ((x @ self.a[...].astype(x.dtype)) @ self.b[...].astype(x.dtype))

    def product(self) -> Float[Array, "in out"]:
        """The update of the matrix itself, float32."""
        return self.scale * (self.a[...] @ self.b[...])


def project(x: Float[Array, "... in"], module: Any, name: str) -> Float[Array, "... out"]:
    """Product with a module's weight of this name, with its bias and its factors if it has them."""
    out = x @ getattr(module, name)[...].astype(x.dtype)
    bias = getattr(module, f"{name}_bias", None)
    if bias is not None:
        out += bias[...].astype(x.dtype)
    update = module.lora.get(name)
    return out if update is None else out + update(x)


class LowRankLayout(TunedLayout):
    """Which row of the banks updates which expert, and which device that row.

    Base matrices and factors meet the same sorted rows. So updated experts come first among the
    base experts of their device, in the order of their rows: products with factors stop where they
    end, and nothing is computed for the others.
    """

    @classmethod
    def place(
        cls,
        selected: tuple[tuple[int, ...], ...],
        num_experts: int,
        shards: int,
        loads: Float[np.ndarray, "L E"] | None = None,
    ) -> Self:
        """Layout of experts placed by `place_updated_experts`."""
        placement = place_updated_experts(selected, num_experts, shards, loads)
        return cls(selected, num_experts, shards, placement)

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
    def sources(self) -> np.ndarray:
        """The group that each row of a layer's window updates: int32 `[shards, L, W]`.

        E of the device for rows of other layers: nothing.
        """
        local = self.num_experts // self.shards
        sources = np.full((self.shards, len(self.selected), self.window), local, np.int32)
        for layer, expert, row in self.rows():
            shard, within = divmod(row, self.rows_per_shard)
            place = within - self.window_starts[shard, layer]
            sources[shard, layer, place] = self.groups[shard, layer, expert]
        return sources

    def layer_window(
        self,
        banks: tuple[Float[Array, "R _ _"], ...],
        carried: Carried,
        layer: Int[Array, ""],
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
        window = LowRankWindow(
            (jnp.concatenate([a_gate, a_up], axis=-1), diagonal),
            (a_down, b_down),
            jnp.asarray(self.groups)[shard, layer],
            jnp.asarray(self.sources)[shard, layer],
        )
        return window, carried


class LowRankWindow(NamedTuple):
    """The factors of one layer's updated experts on one device.

    Those of gate and up are one pair: their A side by side, their B on a diagonal of blocks. Scales
    are in B.

    Attributes:
        gate_up, down: A `[W, in, r]` and B `[W, r, out]`; r is twice the rank for gate and up.
        groups: for each expert of the model and the phantom one, the base expert of the device that
            computes its tokens, or as many as there are for nothing.
        sources: the group that each row updates, or as many as there are for none.
    """

    gate_up: tuple[Float[Array, "W D R"], Float[Array, "W R F2"]]
    down: tuple[Float[Array, "W F R"], Float[Array, "W R D"]]
    groups: Int[Array, " E+1"]
    sources: Int[Array, " W"]


def update_rows(
    rows: Float[Array, "M in"],
    factors: tuple[Float[Array, "W in R"], Float[Array, "W R out"]],
    sources: Int[Array, " W"],
    group_sizes: Int[Array, " G"],
) -> Float[Array, "M out"]:
    """Low-rank update of each of the sorted rows' products; 0 for those of experts without one."""
    sizes = jnp.append(group_sizes, 0)[sources]
    a, b = factors
    if a.shape[-1] == 1:  # kernels for TPUs do not compile for a single column
        a, b = jnp.pad(a, ((0, 0), (0, 0), (0, 1))), jnp.pad(b, ((0, 0), (0, 1), (0, 0)))
    return grouped_matmul(grouped_matmul(rows, (a,), sizes), (b,), sizes)


class LowRankExperts(nnx.Module):
    """Factors of the updated experts of all layers.

    Attributes:
        gate, up: `a [R, D, r]`, `b [R, r, F]`.
        down: `a [R, F, r]`, `b [R, r, D]`.
        layout: what their rows are.
    """

    def __init__(self, gate: LowRank, up: LowRank, down: LowRank, layout: LowRankLayout):
        self.gate, self.up, self.down, self.layout = gate, up, down, layout

    @classmethod
    def create(
        cls,
        size: int,
        width: int,
        rank: int,
        scale: float,
        layout: LowRankLayout,
        key: jax.Array,
        mesh: Mesh | None,
    ) -> "LowRankExperts":
        """New factors; an expert's do not depend on where its row is.

        Args:
            size, width: D and F.
        """
        held = [
            -1 if row is None else row[0] * layout.num_experts + row[1] for row in layout.by_row()
        ]
        ids, axes = jnp.asarray(held), ("experts", None, None)

        def draw(key: jax.Array, width: int) -> Array:
            rows = jax.vmap(lambda i: _uniform(jax.random.fold_in(key, i), (1, width, rank))[0])(
                ids
            )
            return jnp.where((ids >= 0)[:, None, None], rows, 0)

        def factors(key: jax.Array, side_in: int, side_out: int) -> LowRank:
            shape = (len(held), side_in, rank)
            a = _made(lambda: draw(key, side_in), axes, Role.ROUTED_EXPERT, shape, mesh)
            shape = (len(held), rank, side_out)
            b = _made(lambda: jnp.zeros(shape), axes, Role.ROUTED_EXPERT, shape, mesh)
            return LowRank(a, b, scale)

        gate, up, down = jax.random.split(key, 3)
        return cls(
            factors(gate, size, width), factors(up, size, width), factors(down, width, size), layout
        )

    @property
    def banks(self) -> tuple[Float[Array, "R _ _"], ...]:
        """A and scaled B of gate, up and down."""
        pairs = (
            (each.a[...], each.scale * each.b[...]) for each in (self.gate, self.up, self.down)
        )
        return tuple(factor for pair in pairs for factor in pair)


def _uniform(key: jax.Array, shape: Sequence[int]) -> Float[Array, "L in r"]:
    """A as `peft` draws it (Kaiming, a = sqrt(5)): uniform within 1 / sqrt(in)."""
    bound = 1 / math.sqrt(shape[1])
    return jax.random.uniform(key, tuple(shape), jnp.float32, -bound, bound)


def _made(
    make: Any, axes: tuple, role: Role, shape: tuple[int, ...], mesh: Mesh | None
) -> nnx.LoRAParam:
    """A parameter whose value every device makes only its part of."""
    place = None if mesh is None else NamedSharding(mesh, RULES.spec(axes, shape, mesh))
    return nnx.LoRAParam(jax.jit(make, out_shardings=place)(), axes=axes, role=role)
