"""Low-rank updates of frozen matrices (LoRA, arXiv 2106.09685): `x W + scale (x A) B`.

Factors of attention and feed-forward layers lie in the modules whose weights they update, stacked
by layer like these. Those of routed experts are banks beside the model, one row per updated (layer,
expert), like tuned experts (`tuned.py`).

Letters: L layers, R rows of a bank, r rank, D model width, F expert width; in and out, the sides of
a matrix.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float

from esft_jax.adapt.slots import LowRankLayout
from esft_jax.model.params import Role
from esft_jax.sharding import RULES


class LowRank(nnx.Module):
    """The factors of one matrix in every layer, or of one in every row of a bank.

    Attributes:
        a: `[L, in, r]`.
        b: `[L, r, out]`.
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
        a, b = (factor[...].astype(jnp.float32) for factor in (self.a, self.b))
        return self.scale * (a @ b)


class LowRankExperts(nnx.Module):
    """Factors of the updated experts of all layers.

    Attributes:
        gate, up: `a [R, D, r]`, `b [R, r, F]`.
        down: `a [R, F, r]`, `b [R, r, D]`.
        layout: what their rows are.
    """

    default_id = None

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
        ids, axes = jnp.asarray(layout.held), ("experts", None, None)

        def draw(key: jax.Array, width: int) -> Array:
            rows = jax.vmap(lambda i: _uniform(jax.random.fold_in(key, i), (1, width, rank))[0])(
                ids
            )
            return jnp.where((ids >= 0)[:, None, None], rows, 0)

        def factors(key: jax.Array, side_in: int, side_out: int) -> LowRank:
            shape = (len(ids), side_in, rank)
            a = _made(lambda: draw(key, side_in), axes, Role.ROUTED_EXPERT, shape, mesh)
            shape = (len(ids), rank, side_out)
            b = _made(lambda: jnp.zeros(shape), axes, Role.ROUTED_EXPERT, shape, mesh)
            return LowRank(a, b, scale)

        gate, up, down = jax.random.split(key, 3)
        return cls(
            factors(gate, size, width), factors(up, size, width), factors(down, width, size), layout
        )

    @property
    def banks(self) -> tuple[Float[Array, "R _ _"], ...]:
        """A and scaled B of gate, up and down, float32."""
        pairs = (
            (each.a[...].astype(jnp.float32), each.scale * each.b[...].astype(jnp.float32))
            for each in (self.gate, self.up, self.down)
        )
        return tuple(factor for pair in pairs for factor in pair)


def _uniform(key: jax.Array, shape: Sequence[int]) -> Float[Array, "L in r"]:
    """A as `peft` draws it (Kaiming, a = sqrt(5)): uniform within 1 / sqrt(in)."""
    # Within 1 first: times 2 less 1 is rounded once, whether or not a compiler fuses both. So the
    # bits are the same on any mesh.
    return jax.random.uniform(key, tuple(shape), jnp.float32, -1, 1) / math.sqrt(shape[1])


def _made(
    make: Any, axes: tuple, role: Role, shape: tuple[int, ...], mesh: Mesh | None
) -> nnx.LoRAParam:
    """A parameter whose value every device makes only its part of."""
    place = None if mesh is None else NamedSharding(mesh, RULES.spec(axes, shape, mesh))
    return nnx.LoRAParam(jax.jit(make, out_shardings=place)(), axes=axes, role=role)
