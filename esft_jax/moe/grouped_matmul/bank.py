"""The matrices of consecutive groups, read where they lie.

Letters: M matrices of an array, `count` of which are the bank's, `[D, F]` each; L layers, E experts
of a layer.
"""

from dataclasses import replace

from flax.struct import dataclass, field
from jaxtyping import Array, Float, Int

from esft_jax.ops.quantised import Quantised


@dataclass
class Bank:
    """Some matrices of an array that may hold others too; cutting them out would copy them.

    Attributes:
        matrices: the array; quantised ones are frozen.
        first: where in it they begin.
        count: how many they are.
        own: what is differentiated in their place, if anything. Its values are those of the
            matrices, are never read, and so never computed; a gradient of the array would be as
            large as all of it.
    """

    matrices: Float[Array, "M *shape"] | Quantised
    first: Int[Array, ""] | int
    count: int = field(pytree_node=False)
    own: Float[Array, "count *shape"] | None = None

    @classmethod
    def layer_of(
        cls,
        stack: Float[Array, "L E *shape"] | Quantised,
        layer: Int[Array, ""] | int,
        own: Float[Array, "E *shape"] | None = None,
    ) -> "Bank":
        """The matrices, or vectors, of one layer."""
        experts, *shape = stack.shape[1:]
        return cls(stack.reshape(-1, *shape), layer * experts, experts, own)

    def __len__(self) -> int:
        return self.count

    def width(self, *, transposed: bool) -> int:
        """Columns of a product with its matrices, or with their transposes."""
        return self.matrices.shape[1 if transposed else 2]


def as_rows(vectors: Float[Array, "M F"] | Bank) -> Float[Array, "M 1 F"] | Bank:
    """Vectors as matrices of a single row."""
    if not isinstance(vectors, Bank):
        return vectors[:, None]
    own = None if vectors.own is None else vectors.own[:, None]
    return replace(vectors, matrices=vectors.matrices[:, None], own=own)
