"""Quantised matrices of a base: as its files keep them, or made of those in full precision.

`convert --quantise` keeps them beside a converted checkpoint, in a folder
`quantised/PART-SCHEME-GROUP` for each part of the model, such as `experts-int4-64`: for every
parameter a Zarr array of codes and one of scales, whose chunks are of single matrices (or of parts
of very large ones), and `manifest.json`, which is written last: without it the folder does not
count.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from flax import nnx

from esft_jax.blocks import Box
from esft_jax.checkpoint.arrays import open_array, read_array
from esft_jax.checkpoint.source import Source
from esft_jax.errors import InputError
from esft_jax.families.tensors import LeafPath
from esft_jax.files import checked, read_json
from esft_jax.model.config import ModelConfig
from esft_jax.model.quantised import quantise_model
from esft_jax.model.transformer import Transformer
from esft_jax.ops.quantisation import Quantisation, Scheme
from esft_jax.ops.quantised import Quantised, quantise

QUANTISED = "quantised"
MANIFEST = "manifest.json"
FORMAT = "esft_jax quantised weights, version 1"

PartName = Literal["experts", "rest"]
"""What is quantised, as the configuration calls it."""
Place = tuple[int, ...]
"""Of a matrix in the stack that a parameter is."""
Matrix = tuple[np.ndarray, np.ndarray]
"""Codes and scales of a matrix."""


@dataclass(frozen=True)
class Manifest:
    """What `convert --quantise` writes last.

    Attributes:
        base_fingerprint: of the base in full precision that the matrices were made of.
        part: what is quantised.
        scheme, group_size: how.
        parameters: their paths.
        fingerprint: of all codes and scales.
    """

    format: str
    base_fingerprint: str
    part: PartName
    scheme: Scheme
    group_size: int
    parameters: list[str]
    fingerprint: str


class QuantisedFolder:
    """Matrices of a part of the model that are kept quantised.

    Args:
        folder: is finished.
        base: fingerprint of the base that it lies beside.

    Raises:
        InputError: it is of another base, or damaged.
    """

    def __init__(self, folder: Path, base: str):
        self.folder, path = folder, folder / MANIFEST
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path}: key 'format': expected {FORMAT!r}")
        self._manifest = checked(Manifest, content, str(path))
        if self._manifest.base_fingerprint != base:
            raise InputError(
                f"{path}: base_fingerprint: these are not of the base that they lie beside; delete "
                "them, and `convert --quantise` makes new ones"
            )
        self._parameters = set(self._manifest.parameters)
        self._arrays: dict[Path, ts.TensorStore] = {}

    def keeps(self, path: LeafPath, like: Quantised) -> bool:
        """Whether a parameter is kept, quantised like this."""
        how = self._manifest.scheme, self._manifest.group_size
        return how == (like.scheme, like.group_size) and ".".join(path) in self._parameters

    def matrix(self, path: LeafPath, place: Place, like: Quantised) -> Matrix:
        """Codes and scales of a matrix of a parameter that is kept.

        Raises:
            InputError: they are damaged or missing.
        """
        codes, scales = (
            self._read(leaf, place, part) for leaf, part in arrays_of(self.folder, path, like)
        )
        return codes, scales

    def _read(self, path: Path, place: Place, like: jax.Array) -> np.ndarray:
        if path not in self._arrays:
            block = matrix_block(like.shape)
            types = [np.dtype(like.dtype)]
            self._arrays[path] = open_array(path, like.shape, block, types, MANIFEST)
        return read_array(path, self._arrays[path], matrix_box(place, like.shape))[
            (0,) * len(place)
        ]


def arrays_of(folder: Path, path: LeafPath, like: Quantised) -> Iterator[tuple[Path, jax.Array]]:
    """Where codes and scales of a parameter lie, and what they are like."""
    name = ".".join(path)
    yield folder / f"{name}.codes", like.codes
    yield folder / f"{name}.scales", like.scales


def matrix_block(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a matrix within the stack that a parameter is."""
    return (*(1 for _ in shape[:-2]), *shape[-2:])


def matrix_box(place: Place, shape: tuple[int, ...]) -> Box:
    """Box of a matrix in an array of a shape."""
    return (*(slice(i, i + 1) for i in place), *(slice(0, size) for size in shape[-2:]))


def matrix_bytes(like: Quantised) -> int:
    """Of a matrix of a parameter in float32, as it is before it is quantised."""
    rows, columns = like.shape[-2:]
    return 4 * rows * columns


def quantised_params(config: ModelConfig, how: Quantisation) -> dict[LeafPath, Quantised]:
    """Shapes of the parameters of a model that are quantised.

    Raises:
        InputError: one of them cannot be quantised so.
    """

    def make() -> Transformer:
        model = Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
        quantise_model(model, how, frozenset())
        return model

    flat = nnx.to_flat_state(nnx.state(nnx.eval_shape(make), nnx.Param))
    values = {tuple(map(str, keys)): param.get_value() for keys, param in flat}
    return {path: value for path, value in values.items() if isinstance(value, Quantised)}


def check_kept(source: Source, path: LeafPath, like: Quantised) -> None:
    """Check that files keep a parameter which is not to be rounded, but read as it is published.

    Raises:
        InputError: they do not.
    """
    if like.scheme == "fp8" and not source.keeps(path, like):
        raise InputError(
            f"{source.folder}: does not keep {'.'.join(path)} in fp8; expected the folder that it "
            "was converted from, here or for `convert --from ... --quantise`"
        )


def quantised_reader(source: Source, path: LeafPath, like: Quantised) -> Callable[[Place], Matrix]:
    """What reads matrices of a parameter as the files keep them, or else quantises them.

    Args:
        like: all of the parameter; its shapes and scheme are read.
    """
    if source.keeps(path, like):
        return lambda place: source.quantised(path, place, like)

    def read(place: Place) -> Matrix:
        block = source.block(path, matrix_box(place, like.shape), np.dtype(np.float32))
        with jax.default_device(_host()):
            found = quantise(block[(0,) * len(place)], like.scheme, like.group_size)
        return np.asarray(found.codes), np.asarray(found.scales)

    return read


def _host() -> jax.Device | None:
    """What quantises: the host, for the same bits whatever computes with them; None where JAX is
    told to use accelerators alone.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None
