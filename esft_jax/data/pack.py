"""Plans which piece of which document goes into which row.

A document of n tokens is n - 1 (token, next token) pairs; a row holds ``sequence_length`` of
them. Planning pairs instead of tokens keeps every target exactly once, at cuts too, and spends no
position on a final token that predicts nothing.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64


@dataclass(frozen=True)
class PackPlan:
    """Rows as runs of pieces of one flat token array.

    Attributes:
        row_starts: row r holds the pieces ``row_starts[r]`` to ``row_starts[r + 1]``.
        piece_starts: index of each piece's first token in the flat array.
        piece_lengths: pairs in each piece.
    """

    row_starts: Int64[np.ndarray, "N+1"]
    piece_starts: Int64[np.ndarray, "P"]
    piece_lengths: Int64[np.ndarray, "P"]

    def __len__(self) -> int:
        return len(self.row_starts) - 1


def plan_rows(
    starts: Int64[np.ndarray, "D"],
    lengths: Int64[np.ndarray, "D"],
    sequence_length: int,
    seed: int,
) -> PackPlan:
    """Packs documents, ``lengths[d]`` tokens from ``starts[d]`` on of a flat array, into rows.

    Documents longer than a row are split; pieces are placed longest first, each in the fullest
    row that still has room. The seed decides among pieces of equal length.
    """
    starts, lengths = _split(starts, lengths, sequence_length)
    rows = _best_fit(lengths, sequence_length, seed)
    order = np.argsort(rows, kind="stable")
    pieces_per_row = np.bincount(rows)
    row_starts = np.concatenate([[0], np.cumsum(pieces_per_row)]).astype(np.int64)
    return PackPlan(row_starts, starts[order], lengths[order])


def _split(
    starts: Int64[np.ndarray, "D"], lengths: Int64[np.ndarray, "D"], sequence_length: int
) -> tuple[Int64[np.ndarray, "P"], Int64[np.ndarray, "P"]]:
    """Starts and lengths of the row-sized pieces of all documents."""
    pairs = np.maximum(lengths - 1, 0)
    counts = -(-pairs // sequence_length)
    document = np.repeat(np.arange(len(pairs)), counts)
    first_piece = np.cumsum(counts) - counts
    skipped = (np.arange(len(document)) - first_piece[document]) * sequence_length
    return starts[document] + skipped, np.minimum(pairs[document] - skipped, sequence_length)


def _best_fit(lengths: Int64[np.ndarray, "P"], capacity: int, seed: int) -> Int64[np.ndarray, "P"]:
    """Row of each piece, by best-fit decreasing."""
    order = np.random.default_rng(seed).permutation(len(lengths))
    order = order[np.argsort(-lengths[order], kind="stable")]
    rows = np.zeros(len(lengths), np.int64)
    rows_with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # the keys of rows_with_room that have rows, ascending
    count = 0
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        k = bisect_left(rooms, length)
        if k < len(rooms):
            room = rooms[k]
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                del rooms[k]
        else:
            room, row, count = capacity, count, count + 1
        rows[piece] = row
        room -= length
        if room:
            if not rows_with_room[room]:
                insort(rooms, room)
            rows_with_room[room].append(row)
    return rows
