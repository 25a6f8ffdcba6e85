"""Several packed sources in one stream of rows, mixed by weight."""

import dataclasses
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import grain
import numpy as np
from jaxtyping import Int64

from esft_jax.data.batch import Batch
from esft_jax.data.pipeline import DataStats, PackedDataset


@dataclass(frozen=True)
class MixedSource:
    """Rows of one kind, such as those of the task.

    Attributes:
        name: as metrics call it.
        weight: its rows per row of a source with weight 1.
    """

    name: str
    weight: float
    dataset: PackedDataset


class Interleaving:
    """Which source gives row n of an endless mix, and which of its rows that is.

    Every source gets its share of any beginning of the mix, to within one row for each source
    named before it. Nothing is drawn at random, so the place in the mix is one number.
    """

    def __init__(self, weights: Sequence[float]):
        # As the decimals that were written: 0.1 and 0.3 are exactly 1 : 3.
        exact = [Fraction(str(weight)) for weight in weights]
        unit = math.lcm(*(weight.denominator for weight in exact))
        self._weights = [int(weight * unit) for weight in exact]

    def counts(self, rows: int) -> tuple[int, ...]:
        """Rows of each source among the first ones of the mix."""
        counts, weight_left = [], sum(self._weights)
        for weight in self._weights:
            others = rows * (weight_left - weight) // weight_left
            counts.append(rows - others)
            rows, weight_left = others, weight_left - weight
        return tuple(counts)

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> tuple[int, int]:
        before, after = self.counts(row), self.counts(row + 1)
        source = next(i for i, count in enumerate(before) if after[i] > count)
        return source, before[source]


@dataclass(frozen=True)
class MixedDataset:
    """Sources as one dataset: rows are numbered through, source after source.

    Batches say for each row which source it is of.
    """

    sources: tuple[MixedSource, ...]

    @cached_property
    def _starts(self) -> Int64[np.ndarray, "N+1"]:
        return np.cumsum([0, *(len(source.dataset) for source in self.sources)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def sequence_length(self) -> int:
        """Positions in a row."""
        return self.sources[0].dataset.sequence_length

    @property
    def stats(self) -> DataStats:
        """What all sources hold together."""
        parts = [dataclasses.asdict(source.dataset.stats) for source in self.sources]
        hashes = {path: sha for part in parts for path, sha in part.pop("sha256").items()}
        return DataStats(
            **{key: sum(part[key] for part in parts) for key in parts[0]}, sha256=hashes
        )

    def endless_rows(self, seed: int) -> grain.MapDataset[int]:
        """Row numbers for training: interleaved; a source that is used up is shuffled anew."""
        orders = [
            source.dataset.endless_rows((seed + index) % 2**32).map(
                lambda row, start=start: start + row
            )
            for index, (source, start) in enumerate(
                zip(self.sources, self._starts[:-1].tolist(), strict=True)
            )
        ]
        return grain.MapDataset.select_from_datasets(orders, self._interleaving)

    def epochs(self, rows: int) -> dict[str, float]:
        """How often each source was used, after the first rows for training.

        Under `epoch/NAME`, and under `epoch` for the first source.
        """
        counts = self._interleaving.counts(rows)
        found = {
            f"epoch/{source.name}": count / len(source.dataset)
            for source, count in zip(self.sources, counts, strict=True)
        }
        return {"epoch": next(iter(found.values())), **found}

    def places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """`path:line` of the examples that the named rows hold pieces of."""
        found: list[str] = []
        for source, row in zip(*self._find(rows), strict=True):
            found += self.sources[source].dataset.places([row])
        return list(dict.fromkeys(found))

    def gather(self, rows: Sequence[int] | np.ndarray, size: int | None = None) -> Batch:
        """The named rows as a batch, filled up to `size` rows with all-padding ones."""
        sources, local = self._find(rows)
        size = len(rows) if size is None else size
        batch = self.sources[0].dataset.gather([], size)
        batch["sources"] = np.zeros(size, np.int32)
        batch["sources"][: len(rows)] = sources
        arrays: dict[str, Any] = {**batch}
        for index, source in enumerate(self.sources):
            (here,) = np.nonzero(sources == index)
            part: dict[str, Any] = {**source.dataset.gather(local[here])}
            for key, values in part.items():
                arrays[key][here] = values
        return batch

    @property
    def _interleaving(self) -> Interleaving:
        return Interleaving([source.weight for source in self.sources])

    def _find(
        self, rows: Sequence[int] | np.ndarray
    ) -> tuple[Int64[np.ndarray, " B"], Int64[np.ndarray, " B"]]:
        """Source of each row, and its number there."""
        rows = np.asarray(rows, np.int64)
        sources = np.searchsorted(self._starts, rows, side="right") - 1
        return sources, rows - self._starts[sources]
