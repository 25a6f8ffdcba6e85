"""From data files to batches: ``build_dataset``, then ``train_iterator`` or ``eval_batches``.

B rows in a global batch (``esft_jax.data.batch``), S positions in a row.
"""

from __future__ import annotations

import itertools
import weakref
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import grain
import numpy as np
from jaxtyping import Bool, Int32, Int64

from esft_jax.data.batch import Batch
from esft_jax.data.chat import Chat
from esft_jax.data.pack import PackPlan, plan_rows
from esft_jax.data.read import ChatExample, TextExample, read_chat, read_text, source_sha256
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError

Encoded = TypeVar("Encoded")
TooLong = Literal["error", "cut", "drop"]
# Examples encoded together: enough to keep the tokenizer's threads busy.
_CHUNK = 1024
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
class Documents:
    """Where the documents of a flat token array begin, and where they were read.

    Attributes:
        offsets: first token of each document, and the end of the last.
        sources: index in `paths` of each document's source.
        lines: number of its record there, from 1.
    """

    offsets: Int64[np.ndarray, "D+1"]
    sources: Int32[np.ndarray, "D"]
    lines: Int64[np.ndarray, "D"]
    paths: tuple[str, ...]

    def place(self, token: int) -> str:
        """`path:line` of the document that holds a token."""
        document = np.searchsorted(self.offsets, token, side="right") - 1
        return f"{self.paths[self.sources[document]]}:{self.lines[document]}"


@dataclass(frozen=True)
class PackedDataset:
    """Random-access packed rows over one flat token array."""

    tokens: Int32[np.ndarray, "T"]
    learn: Bool[np.ndarray, "T"]
    documents: Documents
    plan: PackPlan
    sequence_length: int
    pad_id: int
    stats: DataStats

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
        return ", ".join(parts + lost)

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
    format: Literal["chat", "text"],
    sequence_length: int,
    too_long: TooLong = "error",
    seed: int = 0,
    length_key: str = "data.sequence_length",
) -> PackedDataset:
    """Reads, tokenizes and packs.

    Args:
        paths: local ``.jsonl`` / ``.parquet`` files or hub names (see ``esft_jax.data.read``).
        tokenizer: of the model.
        format: ``chat`` (loss on assistant messages) or ``text`` (BOS, text, EOS; loss everywhere).
        sequence_length: positions in a row.
        too_long: what to do with a chat that does not fit a row: InputError, cut its end, or drop
            it. Longer text documents are always continued in another row.
        seed: of the packing order.
        length_key: what messages call `sequence_length`.

    Raises:
        InputError: naming file and line.
    """
    if not paths:
        raise InputError("data: no files given; expected at least one path")
    flat = _FlatTokens()
    if format == "chat":
        _add_chats(flat, read_chat(paths), tokenizer, sequence_length, too_long, length_key)
    else:
        _add_texts(flat, read_text(paths), tokenizer)
    tokens, learn, documents = flat.arrays()
    plan = plan_rows(documents.offsets, sequence_length, seed)
    if not len(plan):
        raise InputError(
            f"{', '.join(paths)}: {flat.dropped} examples, and none has a target that a row of "
            f"{sequence_length} tokens holds; expected a larger {length_key}"
        )
    stats = DataStats(
        examples=len(documents.lines),
        rows=len(plan),
        tokens=int(plan.piece_lengths.sum()),
        target_tokens=int(learn.sum()),
        cut=flat.cut,
        dropped=flat.dropped,
        text_bytes=flat.text_bytes,
        sha256={path: source_sha256(path) for path in paths},
    )
    return PackedDataset(tokens, learn, documents, plan, sequence_length, tokenizer.pad_id, stats)


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


class _FlatTokens:
    """Grows one flat token array, document by document."""

    def __init__(self) -> None:
        self.cut = self.dropped = self.text_bytes = 0
        self._tokens = array("i")
        self._learn = bytearray()
        self._offsets = array("q", [0])
        self._paths: dict[str, int] = {}
        self._sources, self._lines = array("i"), array("q")

    def append(self, tokens: list[int], learn: bytes, where: str) -> bool:
        """Add a document, unless it has no target: tell whether it has one."""
        if not any(learn[1:]):
            self.dropped += 1
            return False
        path, _, line = where.rpartition(":")
        self._sources.append(self._paths.setdefault(path, len(self._paths)))
        self._lines.append(int(line))
        self._tokens.extend(tokens)
        self._learn += b"\0"  # nothing predicts the first token
        self._learn += learn[1:]
        self._offsets.append(len(self._tokens))
        return True

    def arrays(
        self,
    ) -> tuple[Int32[np.ndarray, "T"], Bool[np.ndarray, "T"], Documents]:
        return (
            np.frombuffer(self._tokens, np.int32),
            np.frombuffer(self._learn, np.bool_),
            Documents(
                np.frombuffer(self._offsets, np.int64),
                np.frombuffer(self._sources, np.int32),
                np.frombuffer(self._lines, np.int64),
                tuple(self._paths),
            ),
        )


def _add_texts(flat: _FlatTokens, examples: Iterator[TextExample], tokenizer: Tokenizer) -> None:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    while chunk := list(itertools.islice(examples, _CHUNK)):
        texts = [tokenizer.bare(example.text) for example in chunk]
        for example, text, ids in zip(
            chunk, texts, _placed(chunk, tokenizer.encode_batch(texts)), strict=True
        ):
            tokens = [*bos, *ids, tokenizer.eos_id]
            if flat.append(tokens, b"\1" * len(tokens), example.where):
                flat.text_bytes += len(text.encode())


def _add_chats(
    flat: _FlatTokens,
    examples: Iterator[ChatExample],
    tokenizer: Tokenizer,
    sequence_length: int,
    too_long: TooLong,
    length_key: str,
) -> None:
    limit = sequence_length + 1  # the last token is only a target
    while chunk := list(itertools.islice(examples, _CHUNK)):
        encoded = tokenizer.encode_chats(Chat(e.messages, e.tools) for e in chunk)
        for example, samples in zip(chunk, _placed(chunk, encoded), strict=True):
            for tokens, learned in samples:
                learn = bytes(learned)
                if not any(learn[1:]):
                    raise InputError(
                        f"{example.where}: messages: no target; the chat template shows nothing of "
                        "what is to be learned"
                    )
                if len(tokens) <= limit:
                    flat.append(tokens, learn, example.where)
                elif too_long == "error":
                    raise InputError(
                        f"{example.where}: messages: {len(tokens)} tokens; expected at most "
                        f"{limit} ({length_key} + 1), or data.too_long: cut or drop"
                    )
                elif too_long == "drop":
                    flat.dropped += 1
                elif flat.append(tokens[:limit], learn[:limit], example.where):
                    flat.cut += 1


def _placed(
    examples: Sequence[ChatExample] | Sequence[TextExample], encoded: Iterator[Encoded]
) -> Iterator[Encoded]:
    """What examples are encoded to; an `InputError` of one names its place."""
    for example in examples:
        try:
            yield next(encoded)
        except InputError as error:
            raise InputError(f"{example.where}: {error}") from error


def _share(batch_size: int, process_index: int, process_count: int) -> slice:
    """This process's rows of a global batch: contiguous, as a sharded array lays them out."""
    if batch_size % process_count:
        raise InputError(
            f"batch_size: {batch_size} rows cannot be shared by {process_count} processes; "
            "expected a multiple"
        )
    size = batch_size // process_count
    return slice(process_index * size, (process_index + 1) * size)
