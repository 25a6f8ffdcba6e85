"""The matrices of consecutive groups, as the implementations of the grouped matmul read them."""

from flax.struct import dataclass
from jaxtyping import Array, Float, Int


@dataclass
class Bank:
    """One layer of a stack of matrices, without being cut out of it.

    Attributes:
        stack: the matrices of all layers.
        layer: the one that is meant.
    """

    stack: Float[Array, "L E D F"]
    layer: Int[Array, ""]

    def __len__(self) -> int:
        return self.stack.shape[1]

    def width(self, *, transposed: bool) -> int:
        """Columns of a product with its matrices, or with their transposes."""
        return self.stack.shape[2 if transposed else 3]
