"""Weights of routed experts, as the products with them take them.

Letters: L MoE layers, E experts of a layer, E1 = E + 1 with the phantom one (and again as many for
each of several adapters, see `adapt/resident.py`), W rows of a window, G groups, M rows of tokens,
D model width, F expert width, R rank of an update.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
from flax.struct import dataclass, field
from jaxtyping import Array, Float, Int

from esft_jax.host_memory import is_on_host, to_device
from esft_jax.moe.carry import Carried
from esft_jax.moe.grouped_matmul import Bank, as_rows, grouped_matmul
from esft_jax.ops.activation import Activation
from esft_jax.ops.quantised import Quantised


class ExpertWeights(NamedTuple):
    """What there is of each matrix and bias of an expert: arrays, parts of arrays, factors,
    gradients.

    Attributes:
        gate_up: of the first matrices `[..., D, 2F]`, gate first.
        down: of the second ones `[..., F, D]`.
        gate_up_bias, down_bias: of their biases `[..., 2F]` and `[..., D]`; None if there are none.
    """

    gate_up: Any
    down: Any
    gate_up_bias: Any = None
    down_bias: Any = None

    @classmethod
    def held_by(cls, module: Any) -> Self:
        """What a module has by these names."""
        return cls(*(getattr(module, name, None) for name in cls._fields))

    def map(self, apply: Callable[..., Any], *others: "ExpertWeights") -> "ExpertWeights":
        """The same of `apply(gate_up, ...)`, `apply(down, ...)` and so on, for what there is."""
        return ExpertWeights(
            *(None if each[0] is None else apply(*each) for each in zip(self, *others, strict=True))
        )

    @property
    def stacked(self) -> bool:
        """Whether base experts are those of all layers."""
        return isinstance(self.down, LearnedStack) or self.down.ndim == 4

    def of_layer(self, layer: Int[Array, ""] | int) -> "ExpertWeights":
        """A layer's base experts, as arrays or `Bank`s; see `BaseExperts`."""

        def bank(experts: BaseExperts) -> Array | Quantised | Bank:
            if isinstance(experts, LearnedStack):
                return Bank.layer_of(jax.lax.stop_gradient(experts.stack), layer, experts.own)
            if self.stacked and is_on_host(jax.tree.leaves(experts)[0]):
                return Bank(experts, layer, experts.shape[1])  # for `on_device`
            return Bank.layer_of(experts, layer) if self.stacked else experts

        return self.map(bank)


class LearnedStack(NamedTuple):
    """A layer's base experts while they are trained: those of all layers, which are read, and the
    layer's own, which are differentiated (`Bank.own`).
    """

    stack: Float[Array, "L E *_"]
    own: Float[Array, "E *_"]


# A layer's base experts: alone, or among those of all layers.
BaseExperts = Float[Array, "..."] | Quantised | LearnedStack


class TunedWindow(NamedTuple):
    """One layer's tuned experts on one device.

    Attributes:
        weights: W rows of the tuned bank that contain the layer's own.
        groups: for each expert of the model and the phantom one, what computes its tokens here: a
            row of the window, W + a base expert of the device, or W + all of these for nothing.
    """

    weights: ExpertWeights
    groups: Int[Array, " E1"]


class LowRankWindow(NamedTuple):
    """The factors of one layer's updated experts on one device.

    Those of gate and up are one pair: their A side by side, their B on a diagonal of blocks. Scales
    are in B.

    Attributes:
        factors: A `[W, in, r]` and B `[W, r, out]`; r is twice the rank for gate and up.
        groups: for each expert of the model and the phantom one, the base expert of the device that
            computes its tokens, or as many as there are for nothing.
        sources: the group that each row updates, or as many as there are for none; None if row g
            updates group g, for all of them.
    """

    factors: ExpertWeights
    groups: Int[Array, " E1"]
    sources: Int[Array, " W"] | None


class Layout(Protocol):
    """Which row of the banks beside the base experts belongs to which of them, and which device
    computes it; see `esft_jax.adapt.slots`.
    """

    @property
    def first_layer(self) -> int:
        """Index among the MoE layers of the lowest one with such an expert."""
        ...

    def groups_per_device(self, local: int) -> int:
        """Groups of a device with `local` base experts."""
        ...

    def all_groups(self, banks: Any, layer: Int[Array, ""] | int) -> Int[Array, "shards E1"]:
        """What computes a layer's experts on every device, by groups of the device."""
        ...

    def layer_window(
        self, banks: Any, carried: Carried, layer: Int[Array, ""] | int, shard: Int[Array, ""] | int
    ) -> tuple[Any, Carried]:
        """A layer's window of a device's slice of the banks, and what is carried on."""
        ...


class Adapted(Protocol):
    """Banks beside the base experts, which replace some of them or update them."""

    layout: Any

    @property
    def default_id(self) -> Int[Array, ""] | None:
        """Which of several adapters the rows of a batch have that name none; None if the banks are
        those of all rows, and may be differentiated.
        """
        ...

    @property
    def banks(self) -> Any:
        """A tree of arrays `[R, ...]`, split over devices by rows."""
        ...


@dataclass
class GroupWeights:
    """Matrices and biases of all groups in order: of the tuned experts, if there are any, and of
    the base; and low-rank updates of some of them.

    Attributes:
        banks: a tuple of `Bank` or array for each matrix and bias.
        updates: factors of updated groups.
        activation: of all groups.
    """

    banks: ExpertWeights
    updates: LowRankWindow | None
    activation: Activation = field(pytree_node=False)

    @classmethod
    def of(
        cls,
        base: ExpertWeights,
        window: TunedWindow | LowRankWindow | None,
        activation: Activation,
    ) -> "GroupWeights":
        """Those of a device; see `apply_experts`."""
        if isinstance(window, TunedWindow):
            return cls(window.weights.map(lambda *banks: banks, base), None, activation)
        return cls(base.map(lambda bank: (bank,)), window, activation)

    def on_device(self) -> "GroupWeights":
        """The same, with matrices in the memory of the device; those of a layer are moved there."""
        return replace(self, banks=self.banks.map(lambda banks: tuple(map(_on_device, banks))))

    @property
    def num_groups(self) -> int:
        """How many groups there are: G."""
        return sum(map(len, self.banks.down))

    def multiply(
        self, rows: Float[Array, "M in"], name: str, group_sizes: Int[Array, " G"]
    ) -> Float[Array, "M out"]:
        """Product of each of the sorted rows with its group's matrix: `gate_up` or `down`."""
        out = grouped_matmul(rows, getattr(self.banks, name), group_sizes)
        if self.updates is None:
            return out
        factors = getattr(self.updates.factors, name)
        return out + update_rows(rows, factors, self.updates.sources, group_sizes)

    def add_bias(
        self,
        products: Float[Array, "M out"],
        name: str,
        group_sizes: Int[Array, " G"],
        factors: Float[Array, " M"] | None = None,
    ) -> Float[Array, "M out"]:
        """Products of `multiply`, and their groups' biases, if there are some.

        Args:
            factors: on the biases.
        """
        biases = getattr(self.banks, f"{name}_bias")
        if biases is None:
            return products
        if factors is None:
            factors = jnp.ones(len(products), products.dtype)
        rows = tuple(map(as_rows, biases))
        return products + grouped_matmul(factors[:, None], rows, group_sizes)


def _on_device(bank: Any) -> Any:
    if not isinstance(bank, Bank) or not is_on_host(jax.tree.leaves(bank.matrices)[0]):
        return bank

    # XLA reads no slice of a stack there that was reshaped, so the stack is that of all layers.
    def move(stack: Array) -> Array:
        own = jax.lax.dynamic_index_in_dim(
            stack, bank.first, keepdims=False, allow_negative_indices=False
        )
        return to_device(own)

    return replace(bank, matrices=jax.tree.map(move, bank.matrices), first=jnp.int32(0))


def update_rows(
    rows: Float[Array, "M in"],
    factors: tuple[Float[Array, "W in R"], Float[Array, "W R out"]],
    sources: Int[Array, " W"] | None,
    group_sizes: Int[Array, " G"],
) -> Float[Array, "M out"]:
    """Low-rank update of each of the sorted rows' products; 0 for those of experts without one.

    Args:
        sources: see `LowRankWindow`.
    """
    sizes, starts = group_sizes, None
    if sources is not None:
        begins = jnp.cumsum(group_sizes) - group_sizes
        sizes, starts = (jnp.append(numbers, 0)[sources] for numbers in (group_sizes, begins))
    a, b = factors
    if a.shape[-1] == 1:  # kernels for TPUs do not compile for a single column
        a, b = jnp.pad(a, ((0, 0), (0, 0), (0, 1))), jnp.pad(b, ((0, 0), (0, 1), (0, 0)))
    return grouped_matmul(grouped_matmul(rows, (a,), sizes, starts), (b,), sizes, starts)
