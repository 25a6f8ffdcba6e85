"""Stochastic rounding: what is kept in bfloat16 between updates, and computed in float32.

A bfloat16 has 8 significant bits. A second moment that decays by 0.999, or a master at a small
learning rate, changes by less than half of the last one in an update: rounded to the nearest, it
would never move. Rounded up with the probability that it is above the lower neighbour, it is right
on average (arXiv 1502.02551, 2010.06192).

The random bits are a hash of the seed, the update, the array's name and the element's position. So
nothing is stored for them, a resumed run has the same, and they are computed in the loop that
rounds.
"""

import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, BFloat16, Float32, Int, UInt32

from esft_jax.adapt.tuned import in_bank
from esft_jax.training.hashing import ODD, mixed, positions


@dataclass(frozen=True)
class Rounding:
    """How one update rounds.

    Attributes:
        key: of the seed and the update.
        rows: for every row of the banks, a number of the layer and expert that it holds. A row is
            rounded by that number, so that it does not matter on which device it lies. None
            without banks.
    """

    key: UInt32[Array, ""]
    rows: Int[np.ndarray, " R"] | None

    @classmethod
    def of(cls, seed: int, step: Int[Array, ""], rows: Int[np.ndarray, " R"] | None) -> "Rounding":
        """That of the update after so many steps; no two steps of a run have the same key."""
        return cls(mixed(mixed(jnp.uint32(seed)) ^ step.astype(jnp.uint32)), rows)

    def narrowed(self, tree: Any, before: Any) -> Any:
        """A tree in the types that it was kept in before: bfloat16 by chance.

        Args:
            tree: computed from `widened(before)`, in the same structure.
        """
        return jax.tree_util.tree_map_with_path(self._leaf, before, tree, is_leaf=is_variable)

    def _leaf(self, path: tuple, before: Any, after: Any) -> Any:
        held = self.rows if is_variable(before) and in_bank(before) else None
        name = zlib.crc32(jax.tree_util.keystr(path).encode())

        def narrow(before: Array, after: Array) -> Array:
            if before.dtype == after.dtype:
                return after
            first = None
            # An optimizer may keep something of another shape for a bank.
            if held is not None and after.shape[:1] == held.shape:
                first = jnp.asarray(held.astype(np.uint32))
            bits = mixed(positions(after.shape, first) * ODD ^ mixed(self.key ^ jnp.uint32(name)))
            return round_stochastically(after, bits)

        return jax.tree.map(narrow, before, after)


def round_stochastically(
    x: Float32[Array, "*S"], bits: UInt32[Array, "*S"]
) -> BFloat16[Array, "*S"]:
    """One of the two nearest bfloat16 numbers, the nearer one more often.

    Args:
        bits: random ones; the upper 16 of them decide.
    """
    # The bits that bfloat16 drops, as a fraction of the step to the next number, carry over with
    # the probability of their value.
    words = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits >> 16)
    return jax.lax.bitcast_convert_type((words >> 16).astype(jnp.uint16), jnp.bfloat16)


def is_variable(leaf: Any) -> bool:
    """Whether a part of a tree is a parameter, or a moment of one: both know their axes."""
    return isinstance(leaf, nnx.Variable)


def widened(tree: Any) -> Any:
    """A tree to compute with: what is kept in bfloat16 is float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, tree)
