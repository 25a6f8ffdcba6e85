"""From data files to batches: ``build_dataset``, then ``train_iterator`` or ``eval_batches``.

B rows in a global batch (``esft_jax.data.batch``), S positions in a row.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import grain
import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt16

from esft_jax.data.batch import Batch
from esft_jax.data.formats import Format
from esft_jax.data.pack import PackPlan, plan_rows
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.data.tokens import Documents, TokenizedData, tokenize
from esft_jax.errors import InputError

TooLong = Literal["error", "cut", "drop"]
# Training batches made ahead of the one in use. Making one takes far less than a step.
_AHEAD = 2


@dataclass(frozen=True)
class DataStats:
    """What a dataset holds.

    Attributes:
        examples: examples in the rows, those that were cut too; a chat is one, or one for each
            learned answer where its template rewrites what was said before.
        rows: packed rows.
        tokens: positions that are not padding.
        target_tokens: positions with a loss.
        cut: examples in the rows that were shortened to the sequence length.
        dropped: examples that are in no row: too long, or without a target in what is left.
        text_bytes: UTF-8 bytes of the documents (format ``text``; 0 for chats).
        sha256: hash of each source.
    """

    examples: int
    rows: int
    tokens: int
    target_tokens: int
    cut: int
    dropped: int
    text_bytes: int
    sha256: dict[str, str]


@dataclass(frozen=True)
class PackedDataset:
    """Random-access packed rows over one flat token array.

    Attributes:
        data: the tokens.
        documents: those that are in the rows, as they are in there.
        plan: which piece of them lies where.
        sequence_length: positions in a row.
        pad_id: token of unused positions.
        stats: what the rows hold.
    """

    data: TokenizedData
    documents: Documents
    plan: PackPlan
    sequence_length: int
    pad_id: int
    stats: DataStats

    @property
    def tokens(self) -> Int32[np.ndarray, "T"] | UInt16[np.ndarray, "T"]:
        """Of all documents, see `TokenizedData`."""
        return self.data.tokens

    @property
    def learn(self) -> Bool[np.ndarray, "T"]:
        """Which tokens have a loss."""
        return self.data.learn

    def __len__(self) -> int:
        return len(self.plan)

    def describe(self) -> str:
        """What is in the rows, and how much of the data is not."""
        stats = self.stats
        lost = [f"{stats.cut:,} cut to length"] if stats.cut else []
        lost += [f"{stats.dropped:,} dropped"] if stats.dropped else []
        found = f"{stats.examples:,}"
        if stats.dropped:
            found += f" of {stats.examples + stats.dropped:,}"
        parts = [
            f"{found} examples in {stats.rows:,} rows of {self.sequence_length}",
            f"{stats.tokens:,} tokens",
            f"{stats.target_tokens:,} with a loss",
        ]
        read = f"; read as {self.data.format}"
        if len(stats.sha256) > 1:
            read += f" from {len(stats.sha256)} files"
        return ", ".join(parts + lost) + read + ", tokens kept from before" * self.data.kept

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        """One row: the arrays of a batch, ``[S]`` each."""
        batch: dict[str, Any] = {**self.gather([range(len(self))[row]])}
        return {key: rows[0] for key, rows in batch.items()}

    def endless_rows(self, seed: int) -> grain.MapDataset[int]:
        """Row numbers for training: all of them in a new random order, again and again."""
        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()

    def epochs(self, rows: int) -> dict[str, float]:
        """How often the rows were used, after the first ones for training."""
        return {"epoch": rows / len(self)}

    def places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """`path:line` of the examples that the named rows hold pieces of."""
        starts = self.plan.row_starts
        pieces = [piece for row in rows for piece in range(starts[row], starts[row + 1])]
        found = (self.documents.place(self.plan.piece_starts[piece]) for piece in pieces)
        return list(dict.fromkeys(found))

    def gather(self, rows: Sequence[int] | np.ndarray, size: int | None = None) -> Batch:
        """The named rows as a batch, filled up to ``size`` rows with all-padding ones."""
        shape = (len(rows) if size is None else size, self.sequence_length)
        tokens = np.full(shape, self.pad_id, np.int32)
        targets = np.full(shape, self.pad_id, np.int32)
        segment_ids = np.zeros(shape, np.int32)
        positions = np.zeros(shape, np.int32)
        loss_weights = np.zeros(shape, np.float32)
        plan = self.plan
        for b, row in enumerate(rows):
            column = 0
            pieces = range(plan.row_starts[row], plan.row_starts[row + 1])
            for segment, piece in enumerate(pieces, 1):
                start, length = plan.piece_starts[piece], plan.piece_lengths[piece]
                stop, here = start + length, slice(column, column + length)
                tokens[b, here] = self.tokens[start:stop]
                targets[b, here] = self.tokens[start + 1 : stop + 1]
                segment_ids[b, here] = segment
                positions[b, here] = np.arange(length)
                loss_weights[b, here] = self.learn[start + 1 : stop + 1]
                column += length
        return {
            "tokens": tokens,
            "targets": targets,
            "segment_ids": segment_ids,
            "positions": positions,
            "loss_weights": loss_weights,
        }


def build_dataset(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    sequence_length: int,
    too_long: TooLong = "error",
    seed: int = 0,
) -> PackedDataset:
    """Reads, tokenizes and packs.

    Args:
        paths: of files and folders, patterns, or hub names (see ``esft_jax.data.records``).
        tokenizer: of the model.
        format: of the records (``esft_jax.data.formats``); None recognises it. Chats have a loss on
            assistant messages, texts (BOS, text, EOS) everywhere.
        columns: keys of the records that differ from those of the format.
        sequence_length: positions in a row.
        too_long: what to do with a chat that does not fit a row: InputError, cut its end, or drop
            it. Longer text documents are always continued in another row.
        seed: of the packing order.

    Raises:
        InputError: naming file and line.
    """
    data = tokenize(paths, tokenizer, format, columns)
    return pack(data, tokenizer.pad_id, sequence_length, too_long, seed)


def pack(
    data: TokenizedData,
    pad_id: int,
    sequence_length: int,
    too_long: TooLong = "error",
    seed: int = 0,
    length_key: str = "data.sequence_length",
) -> PackedDataset:
    """Packs tokens into rows; see `build_dataset`.

    Args:
        length_key: what messages call `sequence_length`.

    Raises:
        InputError: a chat is too long, or no example fits.
    """
    documents, cut, dropped = data.documents, 0, data.untaught
    if data.format.is_chat:
        documents, cut = _fitted(data, sequence_length, too_long, length_key)
        dropped += len(data.documents) - len(documents)
    plan = plan_rows(documents.starts, documents.lengths, sequence_length, seed)
    if not len(plan):
        raise InputError(
            f"{', '.join(data.sha256)}: {dropped} examples, and none has a target that a row of "
            f"{sequence_length} tokens holds; expected a larger {length_key}"
        )
    stats = DataStats(
        examples=len(documents),
        rows=len(plan),
        tokens=int(plan.piece_lengths.sum()),
        target_tokens=int(documents.targets.sum()),
        cut=cut,
        dropped=dropped,
        text_bytes=int(documents.text_bytes.sum()),
        sha256=data.sha256,
    )
    return PackedDataset(data, documents, plan, sequence_length, pad_id, stats)


def _fitted(
    data: TokenizedData, sequence_length: int, too_long: TooLong, length_key: str
) -> tuple[Documents, int]:
    """Chats that fit a row, and how many of them were cut for that."""
    documents, limit = data.documents, sequence_length + 1  # the last token is only a target
    long = documents.lengths > limit
    if not long.any():
        return documents, 0
    if too_long == "error":
        first = int(long.argmax())
        raise InputError(
            f"{documents.place(documents.starts[first])}: {data.format.answer_key}: "
            f"{documents.lengths[first]} tokens; expected at most {limit} ({length_key} + 1), or "
            "data.too_long: cut or drop"
        )
    if too_long == "drop":
        return documents.take(~long), 0
    targets = documents.targets.copy()
    for i in np.flatnonzero(long):
        begin = documents.starts[i]
        targets[i] = np.count_nonzero(data.learn[begin : begin + limit])
    lengths = np.minimum(documents.lengths, limit)
    documents = replace(documents, targets=targets, lengths=lengths)
    return documents.take(targets > 0), int(np.count_nonzero(long & (targets > 0)))


class Dataset(Protocol):
    """Packed rows that can be trained on: of one source, or mixed (`esft_jax.data.mix`)."""

    def __len__(self) -> int: ...

    @property
    def sequence_length(self) -> int:
        """Positions in a row."""

    @property
    def stats(self) -> DataStats:
        """What the rows hold."""

    def endless_rows(self, seed: int) -> grain.MapDataset[int]:
        """Row numbers for training."""

    def epochs(self, rows: int) -> dict[str, float]:
        """How often the rows were used, after the first ones for training; by metric name."""

    def places(self, rows: Sequence[int] | np.ndarray) -> list[str]:
        """`path:line` of the examples that the named rows hold pieces of."""

    def gather(self, rows: Sequence[int] | np.ndarray, size: int | None = None) -> Batch:
        """The named rows as a batch, filled up to ``size`` rows with all-padding ones."""


def train_iterator(
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    place: Callable[[Batch], Any] = lambda batch: batch,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainIterator:
    """Endless batches ``[B / process_count, S]``, reshuffled each epoch, made ahead by a thread.

    The global batches depend on neither the process count nor on where a run was resumed: this
    process gets its contiguous share of each. ``get_state`` / ``set_state`` resume exactly: the
    state is that of the batches handed out, whatever was made ahead. ``close`` ends the thread.

    Args:
        place: done to a batch in that thread, such as placing it on devices; its result is what
            the iterator gives.
    """
    mine = _share(batch_size, process_index, process_count)
    # Other processes' rows are never made.
    batches = batch_rows(dataset, batch_size, seed).map(
        lambda rows: place(dataset.gather(rows[mine]))
    )
    # Rows lie packed in memory: one thread is enough, and more would contend for Python's lock.
    one_thread = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return TrainIterator(
        grain.experimental.ThreadPrefetchIterDataset(
            batches.to_iter_dataset(one_thread), prefetch_buffer_size=_AHEAD
        )
    )


class TrainIterator(Iterator[Any]):
    """What `train_iterator` gives.

    An iterator of grain that is alive when the interpreter ends prints a traceback, closed or not;
    so this class drops it before then.
    """

    def __init__(self, dataset: grain.IterDataset[Any]):
        self._held = [iter(dataset)]
        self.close = weakref.finalize(self, _close, self._held)

    def __next__(self) -> Any:
        """The next batch."""
        return next(self._held[0])

    def get_state(self) -> dict[str, Any]:
        """The position, as JSON."""
        state: dict[str, Any] = self._held[0].get_state()
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self._held[0].set_state(state)


def _close(held: list[grain.DatasetIterator[Any]]) -> None:
    held.pop().close()


def batch_rows(
    dataset: Dataset, batch_size: int, seed: int
) -> grain.MapDataset[Int64[np.ndarray, "B"]]:
    """Row numbers of every global training batch, endless."""
    # An endless sequence has no remainder, but without dropping it its length rounds up past what
    # len() can return.
    return dataset.endless_rows(seed).batch(batch_size, drop_remainder=True)


def eval_batches(
    dataset: PackedDataset,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    rows: Sequence[int] | np.ndarray | None = None,
) -> Iterator[Batch]:
    """One pass over the rows (all of them, or those named), in order.

    Every process gets the same number of batches ``[B / process_count, S]``; the last ones are
    filled with all-padding rows.
    """
    mine = _share(batch_size, process_index, process_count)
    rows = np.arange(len(dataset)) if rows is None else rows
    for start in range(0, len(rows), batch_size):
        batch_rows = rows[start : start + batch_size]
        yield dataset.gather(batch_rows[mine], size=batch_size // process_count)


def sample_rows(dataset: PackedDataset, count: int, seed: int) -> Int64[np.ndarray, "N"]:
    """Numbers of ``count`` different rows drawn at random; of all rows where there are fewer."""
    return np.random.default_rng(seed).permutation(len(dataset))[:count]


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
    """This process's rows of a global batch: contiguous, as a sharded array lays them out."""
    if batch_size % process_count:
        raise InputError(
            f"batch_size: {batch_size} rows cannot be shared by {process_count} processes; "
            "expected a multiple"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
