"""Updates that a run did not make, for their loss or gradients were not finite."""

import jax

from esft_jax.data.pipeline import batch_rows
from esft_jax.errors import Diverged
from esft_jax.files import write_text_atomic
from esft_jax.training.setup import Setup


class Skipped:
    """Counts skipped updates, lists the examples of their batches, and ends a run with too many.

    Attributes:
        count: skipped so far, as far as it was checked.
    """

    def __init__(self, setup: Setup):
        self._config, self._folder, self._data = setup.config, setup.run.skipped, setup.train_set
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
            self.count, config = int(count), self._config.train
            rows = batch_rows(self._data, config.batch_size, self._config.seed)[step - 1]
            examples = self._data.places(rows)
            listed = self._folder / f"{step}.txt"
            if jax.process_index() == 0:
                write_text_atomic(listed, "".join(f"{place}\n" for place in examples))
            if count > config.max_skipped:
                raise Diverged(
                    f"step {step}: loss or gradients are not finite, in {count} updates of this "
                    f"run; train.max_skipped allows {config.max_skipped}. The batch: {examples[0]} "
                    f"and {len(examples) - 1} more examples, listed in {listed} "
                    "(a lower optimizer.learning_rate, or other data)"
                )
