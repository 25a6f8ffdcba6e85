"""Early stopping: the end of a run whose validation loss falls no longer."""

from dataclasses import asdict, dataclass

from esft_jax.train_config import EarlyStoppingConfig


@dataclass
class Stopping:
    """What early stopping goes by, which a checkpoint keeps.

    Attributes:
        lowest: the last loss that was lower than those before it, by `min_delta` at least.
        waited: evaluations since.
    """

    lowest: float | None = None
    waited: int = 0


class EarlyStopping:
    """Counts evaluations without a lower loss."""

    def __init__(self, config: EarlyStoppingConfig):
        self._config, self._now = config, Stopping()

    def see(self, loss: float) -> None:
        """One more evaluation gave a loss."""
        lowest = self._now.lowest
        if lowest is None or loss < lowest - self._config.min_delta:
            self._now = Stopping(loss)
        else:
            self._now.waited += 1

    @property
    def due(self) -> bool:
        """Whether the run ends here."""
        patience = self._config.patience
        return patience is not None and self._now.waited >= patience

    def position(self) -> dict[str, float | int | None]:
        """For a checkpoint, as JSON."""
        return asdict(self._now)

    def restore(self, position: dict | None) -> None:
        """Go on from a checkpoint; None: an older version wrote it."""
        if position is not None:
            self._now = Stopping(**position)
