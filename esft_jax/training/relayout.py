"""Tuned rows that were saved in the layout of another mesh, moved to where this one has them.

On which device a tuned expert lies depends on `mesh.expert` (`adapt/placement.py`). Parameters and
moments of a saved bank are read split along another axis, so that no device holds much, and their
rows are then taken in the new order.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from esft_jax.sharding import RULES

# For every row of a bank, the layer (as an index of the MoE layers) and expert it holds, or None.
Rows = Sequence[Sequence[int] | None]


def saved_shapes(abstract: Any, rows: Rows) -> Any:
    """The state as it was saved with banks of these rows: what to restore into.

    Args:
        abstract: shapes, types and places of the state as it is now.
    """

    def saved(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if not _is_bank(path):
            return leaf
        shape = (len(rows), *leaf.shape[1:])
        mesh = leaf.sharding.mesh
        # Replicated only where the mesh divides neither axis.
        ways = math.prod(mesh.shape[axis] for axis in RULES.embed)
        axis = next((i for i in reversed(range(1, leaf.ndim)) if not shape[i] % ways), None)
        spec = [None if i != axis else RULES.embed for i in range(leaf.ndim)]
        place = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)

    return jax.tree_util.tree_map_with_path(saved, abstract)


def move_rows(state: Any, before: Rows, after: Rows, shardings: Any) -> Any:
    """A restored state with its banks' rows in another order; padding rows become 0.

    Args:
        state: restored into `saved_shapes`.
        shardings: places of the result.
    """
    place = {tuple(row): i for i, row in enumerate(before) if row is not None}
    source = np.array([-1 if row is None else place[tuple(row)] for row in after], np.int32)

    def move(path: tuple, leaf: jax.Array) -> jax.Array:
        if not _is_bank(path):
            return leaf
        filled = (source >= 0).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(filled, leaf[np.maximum(source, 0)], 0)

    moved = jax.jit(
        lambda state: jax.tree_util.tree_map_with_path(move, state), out_shardings=shardings
    )
    return moved(state)


def _is_bank(path: tuple) -> bool:
    return "'tuned_experts'" in jax.tree_util.keystr(path)
