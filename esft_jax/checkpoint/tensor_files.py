"""Safetensors files of one folder, read lazily and by slices."""

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from esft_jax.blocks import Box
from esft_jax.errors import InputError
from esft_jax.files import POINTER_BYTES, check_file, check_not_pointer, read_json, visible

# Names in safetensors headers of the types that weights may have.
DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The smallest type that holds numbers of all these types without loss."""
    # NumPy knows no type for bfloat16 beside float16.
    return reduce(jnp.promote_types, dtypes)


class TensorInfo(NamedTuple):
    """What a header says about a tensor; `offset` is of its data in the file, in bytes."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class TensorFiles(Mapping[str, TensorInfo]):
    """All tensors of a folder: one safetensors file, or shards with an index.

    A mapping of tensor name to `TensorInfo`; tensor data stays on disk until it is read.

    Attributes:
        known: types that tensors may be stored in, by their names in headers.

    Raises:
        InputError: no safetensors, a missing or damaged file, or an index that does not fit them.
    """

    known: Mapping[str, np.dtype] = DTYPES

    def __init__(self, folder: str | Path, infos: Mapping[str, TensorInfo] | None = None):
        self.folder = Path(folder)
        self._infos = dict(self._headers() if infos is None else infos)

    def to_carry(self, names: Iterable[str]) -> Self:
        """Some of the tensors, which are written again and nothing computes with.

        Raises:
            InputError: one of them has an unknown type.
        """
        found = copy.copy(self)
        found._infos = {name: self[name] for name in names}
        for name, info in found.items():
            self.check(name, info.shape)
        return found

    def dtype(self, name: str) -> np.dtype:
        """The type a tensor is read in."""
        return DTYPES[self[name].dtype]

    def __getitem__(self, name: str) -> TensorInfo:
        if name not in self._infos:
            raise InputError(f"{self.folder}: tensor {name!r} is missing")
        return self._infos[name]

    def __contains__(self, name: object) -> bool:
        return name in self._infos

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in the order of their names."""
        return sorted({info.file for info in self.values()})

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise an `InputError` unless the tensor exists with this shape and a known type."""
        info = self[name]
        if info.shape != shape:
            found, expected = list(info.shape), list(shape)
            raise InputError(
                f"{info.file}: tensor {name!r} has shape {found}; config.json expects {expected}"
            )
        if info.dtype not in self.known:
            hint = ""
            if info.dtype.startswith("F8_"):
                hint = ", or fp8 as quantization_config of config.json describes it"
            raise InputError(
                f"{info.file}: tensor {name!r} has type {info.dtype}; expected "
                f"{', '.join(self.known)}{hint}"
            )

    def read(self, name: str, index: Box = ()) -> np.ndarray:
        """A tensor, or the part of it that `index` selects.

        It is the file itself in memory: its data is read when it is used, and no longer counts as
        memory of the process when it is forgotten.
        """
        return np.asarray(map_tensor(name, self[name], self.dtype(name))[index])

    def check_finite(self) -> None:
        """Read all tensors, and raise an `InputError` that names one with a NaN or an infinity."""
        for name, info in self.items():
            self.check(name, info.shape)
            if not is_finite(self.read(name)):
                raise InputError(
                    f"{info.file}: tensor {name!r} has values that are not finite numbers"
                )

    def _headers(self) -> Iterator[tuple[str, TensorInfo]]:
        """What is known of each tensor: one file has it.

        Like `transformers`, all tensors of a listed shard count.
        """
        held = visible(self.folder)
        files, listed, index = self._chosen(held)
        holds: dict[str, Path] = {}
        for path in files:
            header, begin = _read_header(path)
            for name in sorted(header):
                if listed is not None and listed.get(name) != path.name:
                    place = f"lists it in {listed[name]}" if name in listed else "does not list it"
                    raise InputError(f"{path}: has tensor {name!r}; {index} {place}")
                stored, holds[name] = header[name], path
                shape, offset = tuple(stored["shape"]), begin + stored["data_offsets"][0]
                yield name, TensorInfo(path, stored["dtype"], shape, offset)
        for name, file in (listed or {}).items():
            if name not in holds:
                raise InputError(
                    f"{self.folder / file}: tensor {name!r} is missing; {index} lists it here"
                )
        # Other files may be of another tool, but none may say something else of these tensors.
        for path in held:
            if path.name.endswith(".safetensors") and path not in files:
                again = sorted(holds.keys() & _read_header(path)[0])
                if again:
                    raise InputError(
                        f"{path}: has tensor {again[0]!r}, as {holds[again[0]]} has; expected "
                        "every tensor in one file"
                    )

    def _chosen(self, held: list[Path]) -> tuple[list[Path], dict[str, str] | None, Path | None]:
        """The files that count, and the index with its list of tensors, if there is one.

        Args:
            held: all that the folder holds.
        """
        files = [path for path in held if path.name.endswith(".safetensors")]
        indices = [path for path in held if path.name.endswith(".safetensors.index.json")]
        index = _only(indices, self.folder / "model.safetensors.index.json")
        if index is not None:
            listed = _read_index(index)
            shards = [self.folder / file for file in sorted(set(listed.values()))]
            for path in shards:
                if not os.path.exists(path):  # nor is one of a name that no file can have
                    raise InputError(f"{path}: missing shard; {index} lists it")
            return shards, listed, index
        file = _only(files, self.folder / "model.safetensors")
        if file is not None:
            return [file], None, None
        if files:
            raise InputError(
                f"{self.folder}: {len(files)} safetensors files without an index; expected "
                "model.safetensors.index.json"
            )
        pickled = [path for end in (".bin", ".pt") for path in held if path.name.endswith(end)]
        found = f"only {pickled[0].name}; pickled weights are not read, " if pickled else ""
        raise InputError(f"{self.folder}: no weights: {found}expected model.safetensors")


def map_tensor(name: str, info: TensorInfo, dtype: np.dtype) -> np.ndarray:
    """The data of a tensor, as the file in memory.

    Raises:
        InputError: it cannot be read.
    """
    if 0 in info.shape:  # which cannot be mapped
        return np.empty(info.shape, dtype)
    try:
        return np.memmap(info.file, dtype, "r", info.offset, info.shape)
    except (OSError, ValueError) as error:  # it was changed since its header was read
        raise InputError(f"{info.file}: tensor {name!r} cannot be read: {error}") from None


def is_finite(tensor: np.ndarray) -> bool:
    """Whether a tensor has neither NaN nor infinities, by their exponents.

    NumPy knows no such function for bfloat16 that is as fast.
    """
    info = ml_dtypes.finfo(tensor.dtype)
    bits = np.dtype(f"u{tensor.itemsize}")
    ones = bits.type(((1 << info.nexp) - 1) << info.nmant)  # an exponent of NaN and infinity
    # In parts, so that no copy of a large tensor is made.
    parts = np.array_split(tensor.view(bits).reshape(-1), max(tensor.nbytes >> 20, 1))
    return not any(((part & ones) == ones).any() for part in parts)


def _only(paths: list[Path], usual: Path) -> Path | None:
    """The one of several files that counts: the one of the usual name, if there is a choice."""
    if usual in paths:
        return usual
    return paths[0] if len(paths) == 1 else None


def _read_index(path: Path) -> dict[str, str]:
    """File of each tensor."""
    raw = read_json(path)
    listed = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise InputError(f"{path}: expected a JSON object with the key 'weight_map'")
    for name, file in listed.items():
        # A path would lead out of the folder.
        if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
            raise InputError(f"{path}: weight_map: {name}: {file!r} is no file name")
    return listed


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What the header says of each tensor, and where the data begins."""
    check_file(path)
    try:
        with path.open("rb") as file:
            check_not_pointer(path, file.read(POINTER_BYTES))
        # The library checks the header, and that the file is as long as it says. It would map the
        # whole file for as long as it is open.
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated safetensors: {error}") from None
    header.pop("__metadata__", None)
    return header, 8 + size
