"""The matrices of consecutive groups, as the implementations of the grouped matmul read them."""

from typing import NamedTuple

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


class LearnedLayer(NamedTuple):
    """One layer of a stack that is differentiated.

    Cutting it out would copy it, and a gradient of the stack would be as large as all layers. So it
    is read where it lies, and the gradient is that of the layer alone.

    Attributes:
        stack: what is read.
        own: the layer's matrices, which are never read: nothing computes them.
    """

    stack: Float[Array, "L _ D F"]
    own: Float[Array, "_ D F"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the stack."""
        return self.stack.shape
