"""Which experts each token of a task met: the reference's logs, and our own file of the same.

Scores are sums of it. What they leave out needs the tokens: how sure a choice is, how many tokens
meet a tuned expert, which words do.

Letters: L MoE layers, T tokens, K experts per token, N sequences, N1 = N + 1 limits of them, E
experts.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float64, Int64, Integer

from esft_jax.errors import InputError, one_line
from esft_jax.files import (
    POINTER_BYTES,
    check_file,
    check_not_pointer,
    read_text,
    visible,
    write_bytes_atomic,
)

ROUTING_FILE = "routing.npz"
_LOG_NAME = re.compile(r"expert_weights_(0|[1-9][0-9]*)\.txt")
# Kinds of numbers and axes of what `routing.npz` holds.
_ARRAYS = {
    "layers": ("iu", 1),
    "num_experts": ("iu", 0),
    "expert_ids": ("iu", 3),
    "gates": ("f", 3),
    "starts": ("iu", 1),
    "tokens": ("iu", 1),
}
_MAX_EXPERTS = 65_536  # a typing error in a log must not allocate gigabytes


@dataclass(frozen=True)
class RoutingLog:
    """Experts and gates of every token of some sequences.

    Attributes:
        layers: decoder layer indices of the rows, ascending.
        num_experts: routed experts per layer.
        expert_ids: the K experts of each token.
        gates: their gates, before any scaling factor.
        starts: sequence n is the tokens `starts[n]` to `starts[n + 1]`.
        tokens: vocabulary ids, where known.
    """

    layers: tuple[int, ...]
    num_experts: int
    expert_ids: Integer[np.ndarray, "L T K"]
    gates: Float[np.ndarray, "L T K"]
    starts: Integer[np.ndarray, " N1"]
    tokens: Integer[np.ndarray, " T"] | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences."""
        return self.expert_ids.shape[1]

    @property
    def num_sequences(self) -> int:
        """Sequences: lines of a log; documents of packed rows."""
        return len(self.starts) - 1

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.expert_ids.shape[2]

    @property
    def shares(self) -> Float64[np.ndarray, "L T K"]:
        """Gates divided by their sum over the token's experts; 0 where all are 0."""
        gates = self.gates.astype(np.float64)
        total = gates.sum(axis=-1, keepdims=True)
        return np.divide(gates, total, out=np.zeros_like(gates), where=total > 0)

    def sequence_sums(
        self, *, shares: bool = False
    ) -> tuple[Float64[np.ndarray, "N L E"], Float64[np.ndarray, "N L E"]]:
        """Assignments of each sequence to each expert, and the sums of their gates.

        Args:
            shares: sum `shares` instead of gates.
        """
        weights = self.shares if shares else self.gates
        lengths = np.diff(self.starts)
        shape = (self.num_sequences, len(self.layers), self.num_experts)
        sequence = np.repeat(np.arange(shape[0]), lengths)[:, None]
        counts, sums = np.empty(shape), np.empty(shape)
        size = shape[0] * shape[2]
        for row in range(shape[1]):
            cells = (sequence * shape[2] + self.expert_ids[row]).reshape(-1)
            gates = weights[row].reshape(-1).astype(np.float64)
            counts[:, row] = np.bincount(cells, minlength=size).reshape(shape[0], shape[2])
            sums[:, row] = np.bincount(cells, gates, size).reshape(shape[0], shape[2])
        return counts, sums

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `routing.npz`: ids in the narrowest type, gates in half precision."""
        buffer = BytesIO()
        arrays: dict[str, Any] = {} if self.tokens is None else {"tokens": self.tokens}
        np.savez_compressed(
            buffer,
            layers=np.array(self.layers, np.int32),
            num_experts=np.int32(self.num_experts),
            expert_ids=self.expert_ids.astype(np.min_scalar_type(self.num_experts - 1)),
            gates=self.gates.astype(np.float16),
            starts=self.starts,
            **arrays,
        )
        write_bytes_atomic(Path(folder) / ROUTING_FILE, buffer.getvalue())


def load_routing(folder: str | os.PathLike[str]) -> RoutingLog | None:
    """Read the `routing.npz` of a folder; None where there is none.

    Raises:
        InputError: it is damaged, or something else.
    """
    path = Path(folder) / ROUTING_FILE
    if not os.path.lexists(path):
        return None
    check_file(path)
    try:
        with path.open("rb") as file:
            check_not_pointer(path, file.read(POINTER_BYTES))
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except InputError:
        raise
    except Exception as error:  # whatever the parsers of zip files and arrays raise
        raise InputError(f"{path}: not a file of `score` ({one_line(error)})") from None
    for name, (kind, rank) in _ARRAYS.items():
        if name not in arrays and name != "tokens":
            raise InputError(f"{path}: not a file of `score` ({name} is missing)")
        array = arrays.get(name)
        if array is not None and (array.ndim != rank or array.dtype.kind not in kind):
            raise InputError(
                f"{path}: {name}: {array.dtype} of shape {list(array.shape)}; expected a file of "
                "`score`"
            )
    log = RoutingLog(
        layers=tuple(arrays["layers"].tolist()),
        num_experts=int(arrays["num_experts"]),
        expert_ids=arrays["expert_ids"],
        gates=arrays["gates"],
        starts=arrays["starts"],
        tokens=arrays.get("tokens"),
    )
    fits = (
        log.expert_ids.size > 0
        and log.expert_ids.shape == log.gates.shape
        and len(log.layers) == len(log.expert_ids)
        and log.layers[0] >= 0
        and all(layer < following for layer, following in pairwise(log.layers))
        and len(log.starts) > 1
        and log.starts[0] == 0
        and log.starts[-1] == log.num_tokens
        and (np.diff(log.starts.astype(np.int64)) > 0).all()
        and 0 <= int(log.expert_ids.min()) <= int(log.expert_ids.max()) < log.num_experts
        and log.num_experts <= _MAX_EXPERTS
        and (np.isfinite(log.gates) & (log.gates >= 0)).all()
        and (
            log.tokens is None
            or (log.tokens.shape == (log.num_tokens,) and int(log.tokens.min()) >= 0)
        )
    )
    if not fits:
        raise InputError(f"{path}: arrays do not fit together; expected a file of `score`")
    return log


def find_logs(folder: Path) -> dict[int, Path]:
    """The reference's logs in a folder, by layer."""
    return {
        int(match[1]): file for file in visible(folder) if (match := _LOG_NAME.fullmatch(file.name))
    }


def read_logs(files: Mapping[int, Path], experts_per_token: int) -> RoutingLog:
    """Read the reference's logs, one file per layer.

    Raises:
        InputError: a layer is missing, a line is malformed, or layers differ in their sequences.
    """
    layers = sorted(files)
    check_no_gap(layers, str(files[layers[0]].parent))
    if experts_per_token < 1:
        raise InputError(f"experts_per_token: {experts_per_token} is not a number from 1")
    logs = [_read_log(files[layer], experts_per_token) for layer in layers]
    first = logs[0][2]
    for layer, (_, _, starts) in zip(layers, logs, strict=True):
        if not np.array_equal(starts, first):
            raise InputError(
                f"{files[layer]}: {starts[-1]} tokens in {len(starts) - 1} sequences, but layer"
                f" {layers[0]} has {first[-1]} in {len(first) - 1}; expected the same data in"
                " every layer"
            )
    # The logs do not say how many experts a layer has; one above every id ever chosen has score 0.
    return RoutingLog(
        layers=tuple(layers),
        num_experts=1 + max(int(ids.max()) for ids, *_ in logs),
        expert_ids=np.stack([ids for ids, *_ in logs]),
        gates=np.stack([gates for _, gates, _ in logs]),
        starts=first,
    )


def _read_log(
    path: Path, experts_per_token: int
) -> tuple[Int64[np.ndarray, "T K"], Float64[np.ndarray, "T K"], Int64[np.ndarray, " N1"]]:
    """Read one layer's log: expert ids, gates, where each sequence starts."""
    all_ids, all_gates = [], []
    lines = read_text(path).splitlines()
    for number, line in enumerate(lines, start=1):
        where = f"{path}:{number}"
        halves = line.split("\t\t")
        if len(halves) != 2:
            raise InputError(f"{where}: expected expert ids, two tabs, gates, all joined by tabs")
        try:
            ids = np.array(list(map(int, halves[0].split("\t"))), dtype=np.int64)
            gates = np.array(list(map(float, halves[1].split("\t"))), dtype=np.float64)
        except (ValueError, OverflowError) as error:
            raise InputError(f"{where}: {error}; expected whole ids and decimal gates") from None
        if ids.size != gates.size:
            raise InputError(f"{where}: {ids.size} expert ids but {gates.size} gates")
        if ids.size % experts_per_token:
            raise InputError(
                f"{where}: {ids.size} expert ids are no multiple of {experts_per_token} per token"
            )
        if ids.min() < 0 or ids.max() >= _MAX_EXPERTS:
            raise InputError(f"{where}: an expert id is not in 0 to {_MAX_EXPERTS - 1}")
        if not (np.isfinite(gates) & (gates >= 0)).all():
            raise InputError(f"{where}: a gate is not a finite number >= 0")
        by_token = np.sort(ids.reshape(-1, experts_per_token), axis=1)
        if (by_token[:, 1:] == by_token[:, :-1]).any():
            raise InputError(
                f"{where}: a token has one expert twice; expected {experts_per_token} distinct"
            )
        all_ids.append(ids)
        all_gates.append(gates)
    if not lines:
        raise InputError(f"{path}: empty log; expected one line per sequence")
    lengths = [ids.size // experts_per_token for ids in all_ids]
    return (
        np.concatenate(all_ids).reshape(-1, experts_per_token),
        np.concatenate(all_gates).reshape(-1, experts_per_token),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )


def check_no_gap(layers: list[int], where: str) -> None:
    """Raise an `InputError` unless every layer from the first to the last is there."""
    for layer, following in pairwise(layers):
        if following != layer + 1:
            raise InputError(
                f"{where}: layer {layer + 1} is missing; expected every layer from {layers[0]}"
                f" to {layers[-1]}"
            )
