"""Safetensors files of one folder, read lazily and by slices."""

import json
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from esft_jax.errors import InputError
from esft_jax.files import parse_json, read_text

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

    Raises:
        InputError: no safetensors, a missing or damaged file, or an index that does not fit them.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self._infos = dict(self._headers())

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

    @cached_property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in the order of their names."""
        return sorted(self._index[0])

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise an `InputError` unless the tensor exists with this shape and a known type."""
        info = self[name]
        if info.shape != shape:
            found, expected = list(info.shape), list(shape)
            raise InputError(
                f"{info.file}: tensor {name!r} has shape {found}; config.json expects {expected}"
            )
        if info.dtype not in DTYPES:
            raise InputError(
                f"{info.file}: tensor {name!r} has type {info.dtype}; expected {', '.join(DTYPES)}"
            )

    def read(self, name: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        """A tensor, or the part of it that `index` selects, in its stored type.

        It is the file itself in memory: its data is read when it is used, and no longer counts as
        memory of the process when it is forgotten.
        """
        info = self[name]
        try:
            stored = np.memmap(info.file, DTYPES[info.dtype], "r", info.offset, info.shape)
        except (OSError, ValueError) as error:  # it was changed since its header was read
            raise InputError(f"{info.file}: tensor {name!r} cannot be read: {error}") from None
        return np.asarray(stored[index])

    @cached_property
    def _index(self) -> tuple[dict[Path, list[str] | None], Path | None]:
        """Tensor names by file (None: all that the file has), and the index that says so."""
        indices = sorted(self.folder.glob("*.safetensors.index.json"))
        if indices:
            raw = parse_json(read_text(indices[0]), str(indices[0]))
            weight_map = raw.get("weight_map") if isinstance(raw, dict) else None
            if not isinstance(weight_map, dict):
                raise InputError(f"{indices[0]}: expected a JSON object with the key 'weight_map'")
            by_file: dict[Path, list[str] | None] = {}
            for name, file in weight_map.items():
                # A path would lead out of the folder.
                if not isinstance(file, str) or Path(file).name != file:
                    raise InputError(f"{indices[0]}: weight_map: {name}: {file!r} is no file name")
                names = by_file.setdefault(self.folder / file, [])
                assert names is not None
                names.append(name)
            return by_file, indices[0]
        files = sorted(self.folder.glob("*.safetensors"))
        if len(files) > 1:
            raise InputError(
                f"{self.folder}: {len(files)} safetensors files without an index; expected "
                "model.safetensors.index.json"
            )
        if not files:
            pickled = [*self.folder.glob("*.bin"), *self.folder.glob("*.pt")]
            found = f"only {pickled[0].name}; pickled weights are not read, " if pickled else ""
            raise InputError(f"{self.folder}: no weights: {found}expected model.safetensors")
        return {files[0]: None}, None

    def _headers(self) -> Iterator[tuple[str, TensorInfo]]:
        by_file, index = self._index
        for path, expected in by_file.items():
            if not path.is_file():
                raise InputError(f"{path}: missing shard; {index} lists it")
            header, begin = _read_header(path)
            absent = sorted(set(expected or ()) - set(header))
            if absent:
                raise InputError(f"{path}: tensor {absent[0]!r} is missing; {index} lists it here")
            for name in sorted(header) if expected is None else expected:
                stored = header[name]
                shape, offset = tuple(stored["shape"]), begin + stored["data_offsets"][0]
                yield name, TensorInfo(path, stored["dtype"], shape, offset)


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """What the header says of each tensor, and where the data begins."""
    try:
        # The library checks the header, and that the file is as long as it says. It would map the
        # whole file for as long as it is open.
        with safe_open(path, framework="numpy"), path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated safetensors: {error}") from None
    header.pop("__metadata__", None)
    return header, 8 + size
