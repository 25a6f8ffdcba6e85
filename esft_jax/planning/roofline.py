"""Peaks of accelerators, and the least time that a step can take by them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Roofline:
    """Least seconds of a step for each of its resources, were it used at its peak.

    Attributes:
        compute: operations.
        memory: weights and moments, read and written as often as they must be. Activations are
            left out.
        network: bytes received from other devices of a slice.
        host: frozen weights that are moved from the memory of the host, each forward and backward;
            None where it is unknown how fast the device is connected to it.
    """

    compute: float
    memory: float
    network: float
    host: float | None

    @property
    def overlapped(self) -> float:
        """The step, were all of them in use at all times."""
        return max(self._parts)

    @property
    def serial(self) -> float:
        """The step, were they in use one after the other."""
        return sum(self._parts)

    @property
    def _parts(self) -> tuple[float, ...]:
        return self.compute, self.memory, self.network, self.host or 0.0
