"""Updates that a run did not make, for their loss or gradients were not finite."""

from pathlib import Path

import jax

from esft_jax.data.pipeline import Dataset, batch_rows
from esft_jax.errors import Diverged
from esft_jax.files import write_text_atomic
from esft_jax.train_config import TrainConfig


class Skipped:
    """Counts skipped updates, lists the examples of their batches, and ends a run with too many.

    Args:
        folder: gets a file for each skipped update.
        data: the rows that are trained on, in the order that `seed` gives them.

    Attributes:
        count: skipped so far, as far as it was checked.
    """

    def __init__(self, folder: Path, data: Dataset, train: TrainConfig, seed: int):
        self._folder, self._data, self._train, self._seed = folder, data, train, seed
        self._counts: list[jax.Array] = []  # by step, of those since the last check
        self.count = 0

    def add(self, count: jax.Array) -> None:
        """One more step was started; `count` updates are skipped until then."""
        self._counts.append(count)

    def check(self, last: int) -> None:
        """Write down the batches of skipped updates; waits for the last step.

        Args:
            last: number of the last step that was added.

        Raises:
            Diverged: more than `train.max_skipped`.
        """
        counts = jax.device_get(self._counts)
        self._counts.clear()
        for step, count in enumerate(counts, last - len(counts) + 1):
            if count == self.count:
                continue
            self.count, train = int(count), self._train
            rows = batch_rows(self._data, train.batch_size, self._seed)[step - 1]
            examples = self._data.places(rows)
            listed = self._folder / f"{step}.txt"
            if jax.process_index() == 0:
                write_text_atomic(listed, "".join(f"{place}\n" for place in examples))
            if count > train.max_skipped:
                raise Diverged(
                    f"step {step}: loss or gradients are not finite, in {count} updates of this "
                    f"run; train.max_skipped allows {train.max_skipped}. The batch: {examples[0]} "
                    f"and {len(examples) - 1} more examples, listed in {listed} "
                    "(a lower optimizer.learning_rate, or other data)"
                )
