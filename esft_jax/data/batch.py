"""What a training step and a forward pass are given."""

from typing import Any, NotRequired, TypedDict

from jaxtyping import Float32, Int32


class Batch(TypedDict):
    """B packed rows of S positions: a dict, and so a pytree.

    Arrays are NumPy's as `train_iterator` and `eval_batches` make them, and JAX's on devices
    (`place_batch`). With several processes, an iterator gives this process's rows of the batch.

    Attributes:
        tokens: token ids.
        targets: the token that follows each, where it has a weight.
        segment_ids: the documents of a row, 1, 2, ...; 0 is padding.
        positions: of each token in its document, from 0.
        loss_weights: weight of the loss on each target; the iterators give 1 where it is learned,
            and 0 elsewhere.
        sources: in batches of several sources (`data.mix`), the index of each row's.
    """

    tokens: Int32[Any, "B S"]
    targets: Int32[Any, "B S"]
    segment_ids: Int32[Any, "B S"]
    positions: Int32[Any, "B S"]
    loss_weights: Float32[Any, "B S"]
    sources: NotRequired[Int32[Any, " B"]]
