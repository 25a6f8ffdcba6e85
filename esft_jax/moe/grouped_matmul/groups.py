"""Which rows belong to which group.

Letters: N rows, G groups.
"""

import jax
import jax.numpy as jnp
from flax.struct import dataclass
from jaxtyping import Array, Int


@dataclass
class Groups:
    """Disjoint stretches of the rows, one for each matrix; rows of no group are padding.

    Attributes:
        sizes: rows of each group.
        starts: first row of each group; None if group 0 begins at row 0 and every other group where
            the one before it ends.
        order: the groups in the order of their rows; None if `starts` is.
    """

    sizes: Int[Array, " G"]
    starts: Int[Array, " G"] | None = None
    order: Int[Array, " G"] | None = None

    @classmethod
    def within(
        cls, sizes: Int[Array, " G"], starts: Int[Array, " G"] | None, rows: int
    ) -> "Groups":
        """Groups that are disjoint and within the rows, whatever the numbers are at run time:
        kernels read and write where they say. Those of a `Dispatch` do not change.

        Numbers below 0 count as 0, and groups end with the rows. Rows that several groups claim
        belong to the one that begins first (of those that begin together, to the first given).
        """
        sizes = jnp.clip(sizes, 0, rows).astype(jnp.int32)
        if starts is None:
            # Sums too large for int32 are negative; the ends must not go back.
            ends = jax.lax.cummax(jnp.clip(jnp.cumsum(sizes), 0, rows))
            return cls(jnp.diff(ends, prepend=0))
        starts = jnp.clip(starts, 0, rows).astype(jnp.int32)
        ends = starts + jnp.minimum(sizes, rows - starts)
        order = jnp.argsort(starts).astype(jnp.int32)
        taken = jax.lax.cummax(jnp.where(ends > starts, ends, 0)[order])
        free = jnp.zeros_like(starts).at[order].set(jnp.pad(taken[:-1], (1, 0)))
        starts = jnp.where(ends > starts, jnp.maximum(starts, free), starts)
        return cls(jnp.maximum(ends - starts, 0), starts, order)

    @property
    def ends(self) -> Int[Array, " G"]:
        """The row after the last one of each group."""
        return jnp.cumsum(self.sizes) if self.starts is None else self.starts + self.sizes

    def stretches(
        self, rows: int
    ) -> tuple[Int[Array, " S"], Int[Array, " S"], Int[Array, " S"] | None]:
        """All rows in order, in S stretches that belong to one group each, or are padding.

        Returns:
            Sizes and ends of the stretches, and the group of each, G for padding; None for the last
            if the stretches are the groups in their order, followed by the padding.
        """
        if self.starts is None or self.order is None:
            sizes = jnp.append(self.sizes, rows - jnp.sum(self.sizes)).astype(jnp.int32)
            return sizes, jnp.cumsum(sizes), None
        # Padding (of 0 rows or more) lies before and after every group. Groups without rows end
        # where the group before them does.
        limits = jnp.stack([self.starts, self.starts + self.sizes], axis=1)[self.order]
        limits = jnp.where(self.sizes[self.order, None] > 0, limits, 0).reshape(-1)
        ends = jax.lax.cummax(jnp.append(limits, rows)).astype(jnp.int32)
        groups = jnp.full(len(ends), len(self.sizes), jnp.int32).at[1::2].set(self.order)
        return jnp.diff(ends, prepend=0), ends, groups
