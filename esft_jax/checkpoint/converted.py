"""The converted form of a base model: our stacked parameters, sharded on disk.

A folder holds `config.json` and the tokenizer as the Hugging Face folder has them, `params/`, an
Orbax checkpoint with one Zarr array per parameter whose chunks are single source tensors (or parts
of very large ones), and `manifest.json`, which is written last: without it the conversion is
unfinished.
"""

import contextlib
import dataclasses
import itertools
import json
import reprlib
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore as ts

from esft_jax.blocks import Box, box_shape
from esft_jax.checkpoint.tensor_files import DTYPES, TensorFiles
from esft_jax.errors import InputError
from esft_jax.families import load_model_config, tensor_table
from esft_jax.families.tensors import LeafPath, Placement
from esft_jax.files import check_file, checked, read_json

FORMAT = "esft_jax converted base, version 1"
MANIFEST = "manifest.json"
JOURNAL = "conversion.jsonl"
"""Written by `convert`; it names the source, and the tensors that are finished."""
PARAMS = "params"
CARRIED = "carried"

_MAX_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True)
class _Manifest:
    """What `convert` writes last.

    Attributes:
        source: what it was converted from.
        fingerprint: of all weights.
        dtypes: names of the types of the arrays, as in safetensors.
        carried: names of the tensors that the model does not use.
        fused: experts were fused in its files, unlike in most of the family.
    """

    format: str
    source: str
    fingerprint: str
    dtypes: list[Literal["BF16", "F16", "F32"]]
    carried: list[str] = dataclasses.field(default_factory=list)
    fused: bool = False


def is_converted(folder: Path) -> bool:
    """Whether a folder is a conversion, finished or not."""
    return (folder / PARAMS).is_dir() or (folder / JOURNAL).is_file()


class ConvertedSource:
    """A finished conversion.

    Raises:
        InputError: it is unfinished, damaged, or does not fit its `config.json`.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        path = self.folder / MANIFEST
        if not path.is_file():
            raise InputError(
                f"{self.folder}: unfinished conversion; run `python -m esft_jax.convert` again to "
                "complete it"
            )
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path}: key 'format': expected {FORMAT!r}")
        manifest = checked(_Manifest, content, str(path))
        self._fingerprint = manifest.fingerprint
        self.config = load_model_config(self.folder)
        table = tensor_table(self.config)
        self.placements = table.places
        self.fused = manifest.fused or table.experts.stored_fused
        types = [DTYPES[name] for name in manifest.dtypes]
        self.carried = TensorFiles(self.folder, {})
        if manifest.carried:
            self.carried = TensorFiles(self.folder / CARRIED)
        if sorted(self.carried) != sorted(manifest.carried):
            raise InputError(
                f"{self.folder / CARRIED}: its tensors are not those that {path.name} names"
            )
        self._arrays = {
            leaf: self._open(leaf, shape, chunk, types)
            for leaf, (shape, chunk) in _shapes_and_chunks(self.placements).items()
        }

    @property
    def fingerprint(self) -> str:
        """Hash of all weights, as recorded when they were converted."""
        return self._fingerprint

    def dtype(self, name: str) -> np.dtype:
        """The type a tensor is stored in."""
        return np.dtype(self._arrays[self.placements[name].path].dtype.numpy_dtype)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor under its Hugging Face name, in its stored type."""
        place = self.placements[name]
        return place.from_block(self._read(place.path, place.box))

    def block(self, path: LeafPath, box: Box, dtype: np.dtype) -> np.ndarray:
        """A block of a stacked parameter, cast to a type."""
        return self._read(path, box).astype(dtype, copy=False)

    def _open(
        self,
        leaf: LeafPath,
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        types: Sequence[np.dtype],
    ) -> ts.TensorStore:
        path = self.folder / PARAMS / ".".join(leaf)
        metadata = read_json(path / "zarr.json")
        found = metadata if isinstance(metadata, dict) else {}
        dtype = next((d for d in types if d.name == found.get("data_type")), None)
        if dtype is None:
            raise InputError(
                f"{path / 'zarr.json'}: data_type: {found.get('data_type')!r}; {MANIFEST} says "
                f"{' or '.join(d.name for d in types)}"
            )
        if found.get("shape") != list(shape):
            raise InputError(
                f"{path}: shape {found.get('shape')}; config.json expects {list(shape)}"
            )
        # Other codecs or chunks, and the checksums mean nothing.
        for key, expected in array_metadata(shape, chunk, dtype).items():
            if found.get(key) != expected:
                raise InputError(
                    f"{path / 'zarr.json'}: {key}: is {reprlib.repr(found.get(key))}; expected "
                    "what the conversion wrote"
                )
        # A chunk that is not there is an error, not a block of NaN.
        spec = {"driver": "zarr3", "kvstore": _store(path), "fill_missing_data_reads": False}
        with stored(path, "missing or damaged"):
            return ts.open(spec, open=True).result()

    def _read(self, leaf: LeafPath, box: Box) -> np.ndarray:
        path, array = self.folder / PARAMS / ".".join(leaf), self._arrays[leaf]
        for chunk in chunk_boxes(array, box):
            _check_regular(chunk_file(path, array, chunk))
        with stored(path, "cannot be read"):
            return array[box].read().result()


def _check_regular(path: Path) -> None:
    """A FIFO would be waited for. Chunks that are missing are known by the library."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            check_file(path)


@contextlib.contextmanager
def stored(path: Path, what: str) -> Iterator[None]:
    """Make failures of the storage library an `InputError` that names the array."""
    try:
        yield
    except ValueError as error:
        said = str(error).splitlines()[0].partition(" [tensorstore_spec=")[0]
        raise InputError(f"{path}: {what}: {said}") from None


def leaf_shapes(placements: Mapping[str, Placement]) -> dict[LeafPath, tuple[int, ...]]:
    """Shape of every stacked parameter: the smallest that holds all its tensors."""
    shapes: dict[LeafPath, tuple[int, ...]] = {}
    for place in placements.values():
        end = tuple(s.stop for s in place.box)
        before = shapes.get(place.path, end)
        shapes[place.path] = tuple(map(max, before, end))
    return shapes


def _shapes_and_chunks(
    placements: Mapping[str, Placement],
) -> dict[LeafPath, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shape of every stacked parameter, and of a source tensor's block in it."""
    blocks = {place.path: box_shape(place.box) for place in placements.values()}
    return {leaf: (shape, blocks[leaf]) for leaf, shape in leaf_shapes(placements).items()}


def array_metadata(
    shape: tuple[int, ...], block: tuple[int, ...], dtype: np.dtype
) -> dict[str, Any]:
    """How a parameter is stored, as its `zarr.json` says it.

    Args:
        block: shape of a source tensor's part of it.
    """
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {
            "name": "regular",
            "configuration": {"chunk_shape": _chunk(block, dtype.itemsize)},
        },
        "chunk_key_encoding": {"name": "default"},
        # Weights hardly compress; what pays is noticing damage. A lost chunk reads as NaN,
        # which no loss survives, where zeros would pass.
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
        "fill_value": "NaN",
    }


def create_arrays(
    folder: Path, placements: Mapping[str, Placement], dtypes: Mapping[LeafPath, np.dtype]
) -> dict[LeafPath, ts.TensorStore]:
    """Create the arrays of `params/`, or open those that exist, for writing."""
    arrays = {}
    for leaf, (shape, block) in _shapes_and_chunks(placements).items():
        spec = {
            "driver": "zarr3",
            "kvstore": _store(folder / PARAMS / ".".join(leaf)),
            "metadata": array_metadata(shape, block, dtypes[leaf]),
        }
        with stored(folder / PARAMS / ".".join(leaf), "cannot be written"):
            arrays[leaf] = ts.open(spec, open=True, create=True).result()
    return arrays


def _chunk_sizes(array: ts.TensorStore) -> tuple[int, ...]:
    # None, in general, where a layout leaves a size open; `create_arrays` leaves none open.
    return array.chunk_layout.write_chunk.shape  # type: ignore[return-value]


def chunk_file(path: Path, array: ts.TensorStore, box: Box) -> Path:
    """The file of the chunk of an array that a box lies in."""
    sizes = _chunk_sizes(array)
    place = (str(s.start // size) for s, size in zip(box, sizes, strict=True))
    return path.joinpath("c", *place)


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


def orbax_metadata(shapes: Mapping[LeafPath, tuple[int, ...]]) -> str:
    """Content of Orbax's `_METADATA`, from which it knows the tree and the arrays' format."""

    def entry(leaf: LeafPath, shape: tuple[int, ...]) -> dict[str, Any]:
        return {
            "key_metadata": [{"key": key, "key_type": 2} for key in leaf],  # 2: key of a dict
            "value_metadata": {
                # Restored as NumPy arrays unless the caller asks for a sharding.
                "value_type": "np.ndarray",
                "skip_deserialize": False,
                "write_shape": list(shape),
            },
        }

    return json.dumps(
        {
            "tree_metadata": {str(leaf): entry(leaf, shape) for leaf, shape in shapes.items()},
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )


def _chunk(shape: tuple[int, ...], itemsize: int) -> list[int]:
    """A source tensor's block, halved along its longest axis until it is not too large."""
    chunk = list(shape)
    while int(np.prod(chunk)) * itemsize > _MAX_CHUNK_BYTES:
        longest = chunk.index(max(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return chunk


def _store(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": str(path.absolute())}
