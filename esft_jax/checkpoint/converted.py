"""The converted form of a base model: our stacked parameters, sharded on disk.

A folder holds `config.json` and the tokenizer as the Hugging Face folder has them, `params/`, an
Orbax checkpoint with one Zarr array per parameter whose chunks are single source tensors (or parts
of very large ones), and `manifest.json`, which is written last: without it the conversion is
unfinished. `quantised/` may hold matrices as `quantise` would make them.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tensorstore as ts

from esft_jax.blocks import Box, box_shape
from esft_jax.checkpoint.arrays import create_array, open_array, read_array
from esft_jax.checkpoint.journal import JOURNAL
from esft_jax.checkpoint.quantised import QUANTISED, Matrix, QuantisedFolder
from esft_jax.checkpoint.tensor_files import DTYPES, TensorFiles
from esft_jax.errors import InputError
from esft_jax.families import load_model_config, tensor_table
from esft_jax.families.tensors import LeafPath, Placement
from esft_jax.files import checked, read_json
from esft_jax.ops.quantised import Quantised
from esft_jax.progress import Advance

FORMAT = "esft_jax converted base, version 1"
MANIFEST = "manifest.json"
PARAMS = "params"
CARRIED = "carried"


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

    Attributes:
        origin: what it was converted from.

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
        self._fingerprint, self.origin = manifest.fingerprint, manifest.source
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
        self._quantised = [
            QuantisedFolder(path.parent, self._fingerprint)
            for path in sorted((self.folder / QUANTISED).glob(f"[!.]*/{MANIFEST}"))
        ]
        self._arrays = {
            leaf: self._open(leaf, shape, block, types)
            for leaf, (shape, block) in _shapes_and_blocks(self.placements).items()
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

    def block(
        self, path: LeafPath, box: Box, dtype: np.dtype, advance: Advance | None = None
    ) -> np.ndarray:
        """A block of a stacked parameter, cast to a type."""
        block = self._read(path, box).astype(dtype, copy=False)
        if advance is not None:
            advance(block.nbytes)
        return block

    @property
    def kept(self) -> list[Path]:
        """Folders of matrices that are kept quantised."""
        return [found.folder for found in self._quantised]

    def keeps(self, path: LeafPath, like: Quantised) -> bool:
        """Whether `convert --quantise` has written a parameter like this."""
        return any(folder.keeps(path, like) for folder in self._quantised)

    def quantised(self, path: LeafPath, place: tuple[int, ...], like: Quantised) -> Matrix:
        """Codes and scales of a matrix, as they were written."""
        folder = next(folder for folder in self._quantised if folder.keeps(path, like))
        return folder.matrix(path, place, like)

    def _open(
        self,
        leaf: LeafPath,
        shape: tuple[int, ...],
        block: tuple[int, ...],
        types: Sequence[np.dtype],
    ) -> ts.TensorStore:
        path = self.folder / PARAMS / ".".join(leaf)
        return open_array(path, shape, block, types, MANIFEST)

    def _read(self, leaf: LeafPath, box: Box) -> np.ndarray:
        return read_array(self.folder / PARAMS / ".".join(leaf), self._arrays[leaf], box)


def leaf_shapes(placements: Mapping[str, Placement]) -> dict[LeafPath, tuple[int, ...]]:
    """Shape of every stacked parameter: the smallest that holds all its tensors."""
    shapes: dict[LeafPath, tuple[int, ...]] = {}
    for place in placements.values():
        end = tuple(s.stop for s in place.box)
        before = shapes.get(place.path, end)
        shapes[place.path] = tuple(map(max, before, end))
    return shapes


def _shapes_and_blocks(
    placements: Mapping[str, Placement],
) -> dict[LeafPath, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shape of every stacked parameter, and of a source tensor's block in it."""
    blocks = {place.path: box_shape(place.box) for place in placements.values()}
    return {leaf: (shape, blocks[leaf]) for leaf, shape in leaf_shapes(placements).items()}


def create_arrays(
    folder: Path, placements: Mapping[str, Placement], dtypes: Mapping[LeafPath, np.dtype]
) -> dict[LeafPath, ts.TensorStore]:
    """Create the arrays of `params/`, or open those that exist, for writing."""
    return {
        leaf: create_array(folder / PARAMS / ".".join(leaf), shape, block, dtypes[leaf])
        for leaf, (shape, block) in _shapes_and_blocks(placements).items()
    }


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
