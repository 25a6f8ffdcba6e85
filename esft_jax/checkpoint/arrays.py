"""Zarr arrays of converted checkpoints: how they are chunked, and what is checked of them."""

import contextlib
import itertools
import reprlib
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tensorstore as ts

from esft_jax.blocks import Box, within
from esft_jax.errors import InputError
from esft_jax.files import check_file, read_json

_MAX_CHUNK_BYTES = 64 << 20


@contextlib.contextmanager
def stored(path: Path, what: str) -> Iterator[None]:
    """Make failures of the storage library an `InputError` that names the array."""
    try:
        yield
    except ValueError as error:
        said = str(error).splitlines()[0].partition(" [tensorstore_spec=")[0]
        raise InputError(f"{path}: {what}: {said}") from None


def create_array(
    path: Path, shape: tuple[int, ...], block: tuple[int, ...], dtype: np.dtype
) -> ts.TensorStore:
    """Create an array, or open the one that exists, for writing.

    Args:
        block: shape of what is written at once; a chunk of the array is one, or a part of one.
    """
    spec = {
        "driver": "zarr3",
        "kvstore": _store(path),
        "metadata": array_metadata(shape, block, dtype),
        "store_data_equal_to_fill_value": True,  # a chunk that is not there is lost
    }
    with stored(path, "cannot be written"):
        return ts.open(spec, open=True, create=True).result()


def open_array(
    path: Path,
    shape: tuple[int, ...],
    block: tuple[int, ...],
    types: Sequence[np.dtype],
    said_by: str,
) -> ts.TensorStore:
    """Open an array for reading.

    Args:
        types: what it may hold.
        said_by: what says so.

    Raises:
        InputError: it is missing, or none that `create_array` makes.
    """
    metadata = read_json(path / "zarr.json")
    found = metadata if isinstance(metadata, dict) else {}
    dtype = next((d for d in types if d.name == found.get("data_type")), None)
    if dtype is None:
        raise InputError(
            f"{path / 'zarr.json'}: data_type: {found.get('data_type')!r}; {said_by} says "
            f"{' or '.join(d.name for d in types)}"
        )
    if found.get("shape") != list(shape):
        raise InputError(f"{path}: shape {found.get('shape')}; config.json expects {list(shape)}")
    # Other codecs or chunks, and the checksums mean nothing.
    for key, expected in array_metadata(shape, block, dtype).items():
        if found.get(key) != expected:
            raise InputError(
                f"{path / 'zarr.json'}: {key}: is {reprlib.repr(found.get(key))}; expected "
                "what the conversion wrote"
            )
    # A chunk that is not there is an error, not a block of NaN.
    spec = {"driver": "zarr3", "kvstore": _store(path), "fill_missing_data_reads": False}
    with stored(path, "missing or damaged"):
        return ts.open(spec, open=True).result()


def read_array(path: Path, array: ts.TensorStore, box: Box) -> np.ndarray:
    """A box of an array.

    Raises:
        InputError: it is damaged, or a part of it missing.
    """
    for chunk in chunk_boxes(array, box):
        _check_regular(_chunk_file(path, array, chunk))
    with stored(path, "cannot be read"):
        return array[box].read().result()


def write_array(path: Path, array: ts.TensorStore, box: Box, values: np.ndarray) -> None:
    """Write a box of an array, which holds whole chunks; it is on the disk afterwards."""
    for chunk in chunk_boxes(array, box):
        with stored(path, "cannot be written"):
            part = values[within(chunk, box)]
            array[chunk].write(part, can_reference_source_data_indefinitely=True).result()


def array_metadata(
    shape: tuple[int, ...], block: tuple[int, ...], dtype: np.dtype
) -> dict[str, Any]:
    """How an array is stored, as its `zarr.json` says it; see `create_array`."""
    order = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": _chunk(block, dtype.itemsize)},
        },
        "chunk_key_encoding": {"name": "default"},
        # Weights hardly compress; what pays is noticing damage. A lost chunk of other readers is
        # NaN, which no loss survives, where zeros would pass.
        "codecs": [
            {"name": "bytes", **order},
            {"name": "crc32c"},
        ],
        "fill_value": "NaN" if jnp.issubdtype(dtype, jnp.floating) else 0,
    }


def chunk_boxes(array: ts.TensorStore, box: Box) -> Iterator[Box]:
    """The parts of a box that lie in one chunk of an array each."""
    sizes = _chunk_sizes(array)
    axes = [
        [
            slice(max(begin, s.start), min(begin + size, s.stop))
            for begin in range(s.start // size * size, s.stop, size)
        ]
        for s, size in zip(box, sizes, strict=True)
    ]
    return itertools.product(*axes)


def _chunk_sizes(array: ts.TensorStore) -> tuple[int, ...]:
    # None, in general, where a layout leaves a size open; `create_array` leaves none open.
    return array.chunk_layout.write_chunk.shape  # type: ignore[return-value]


def _chunk_file(path: Path, array: ts.TensorStore, box: Box) -> Path:
    """The file of the chunk of an array that a box lies in."""
    sizes = _chunk_sizes(array)
    place = (str(s.start // size) for s, size in zip(box, sizes, strict=True))
    return path.joinpath("c", *place)


def _chunk(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """A block, halved along its longest axis until it is not too large."""
    chunk = list(shape)
    while int(np.prod(chunk)) * itemsize > _MAX_CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return chunk


def _check_regular(path: Path) -> None:
    """A FIFO would be waited for. Chunks that are missing are known by the library."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            check_file(path)


def _store(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": str(path.absolute())}
