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
    """

    compute: float
    memory: float
    network: float

    @property
    def overlapped(self) -> float:
        """The step, were all of them in use at all times."""
        return max(self.compute, self.memory, self.network)

    @property
    def serial(self) -> float:
        """The step, were they in use one after the other."""
        return self.compute + self.memory + self.network
