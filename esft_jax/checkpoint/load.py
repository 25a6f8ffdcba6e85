"""Base weights from disk into a sharded `Transformer`."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from jax.sharding import Mesh, Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from esft_jax.adapt.tuned import ReadExpert
from esft_jax.blocks import bounded
from esft_jax.checkpoint.converted import ConvertedSource, is_converted, leaf_shapes
from esft_jax.checkpoint.finite import check_base
from esft_jax.checkpoint.quantised import check_kept, matrix_bytes, quantised_reader
from esft_jax.checkpoint.source import HuggingFaceSource, Source
from esft_jax.checkpoint.streaming import in_order
from esft_jax.errors import InputError
from esft_jax.families.tensors import LeafPath
from esft_jax.host_memory import Memory
from esft_jax.model.params import expert_matrices_on_host
from esft_jax.model.quantised import quantise_model
from esft_jax.model.transformer import Transformer
from esft_jax.ops.quantisation import Quantisation
from esft_jax.ops.quantised import Quantised
from esft_jax.progress import Advance, Progress
from esft_jax.sharding import param_shardings

# What a hub download fetches: never pickled weights, never code.
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "README.md")
# The same model again, as other programs take it.
_NOT_FROM_HUB = ("*/*.json", "*/*.safetensors")


@dataclass(frozen=True)
class LoadedBase:
    """A base model, and where it comes from.

    Attributes:
        model: the model, on its devices.
        source: its files.
    """

    model: Transformer
    source: Source

    @property
    def fingerprint(self) -> str:
        """Hash of the base weights as stored. A Hugging Face folder is read once more for it."""
        return self.source.fingerprint


def open_source(path: str | Path) -> Source:
    """Open a Hugging Face folder, a converted checkpoint, or a hub name; no weights are read.

    Raises:
        InputError: nothing there, or not a complete, consistent checkpoint.
    """
    folder = local_folder(path)
    return ConvertedSource(folder) if is_converted(folder) else HuggingFaceSource(folder)


def load_base(
    path: str | Path,
    dtype: DTypeLike = jnp.bfloat16,
    mesh: Mesh | None = None,
    quantisation: Quantisation | None = None,
    trained: frozenset[str] = frozenset(),
    frozen_memory: Memory = "device",
) -> LoadedBase:
    """Load a model and keep the link to its files; see `load_model`.

    All processes call it together.

    Args:
        quantisation: how frozen weights are kept; None keeps them in `dtype`.
        trained: roles of the parameters that are not quantised (`quantise_model`).
        frozen_memory: where the matrices of routed experts are kept.
    """
    source = open_source(path)
    return load_source(source, str(path), dtype, mesh, quantisation, trained, frozen_memory)


def load_source(
    source: Source,
    name: str,
    dtype: DTypeLike,
    mesh: Mesh | None,
    quantisation: Quantisation | None = None,
    trained: frozenset[str] = frozenset(),
    frozen_memory: Memory = "device",
) -> LoadedBase:
    """The same of files that are open.

    Args:
        name: what messages call them.
    """

    def make() -> Transformer:
        model = Transformer(source.config, rngs=nnx.Rngs(0), dtype=dtype, mesh=mesh)
        if quantisation is not None:
            quantise_model(model, quantisation, trained)
        return model

    model = nnx.eval_shape(make)
    graph, abstract = nnx.split(model)
    for keys, param in nnx.to_flat_state(abstract):
        if isinstance(like := param.get_value(), Quantised):
            check_kept(source, tuple(map(str, keys)), like)
    places = param_shardings(abstract, mesh, expert_matrices_on_host(frozen_memory))
    shardings = [sharding.get_value() for _, sharding in nnx.to_flat_state(places)]
    leaves = [
        (tuple(map(str, keys)), param, param.get_value(), place)
        for (keys, param), place in zip(nnx.to_flat_state(abstract), shardings, strict=True)
    ]
    loaded = []
    total = sum(_own_bytes(value, place) for _, _, value, place in leaves)
    with Progress("load", total, unit="B") as progress:
        for leaf, param, value, place in leaves:
            read = _read_quantised if isinstance(value, Quantised) else _read_leaf
            value = read(source, leaf, value, place, progress.advance)
            loaded.append((leaf, param.replace(value)))
    base = LoadedBase(nnx.merge(graph, nnx.from_flat_state(loaded)), source)
    check_base(base.model, name)
    return base


def _own_bytes(leaf: jax.ShapeDtypeStruct | Quantised, sharding: Any) -> int:
    """Bytes that this process reads of a parameter, in the types that devices hold."""
    if isinstance(leaf, Quantised):
        return len(_own_matrices(leaf, sharding)) * _held_bytes(leaf)
    items = sum(math.prod(stop - start for start, stop in box) for box in _boxes(leaf, sharding))
    return items * leaf.dtype.itemsize


def _held_bytes(leaf: Quantised) -> int:
    """Bytes of the codes and scales of a matrix."""
    parts = leaf.codes, leaf.scales
    return sum(math.prod(part.shape[-2:]) * part.dtype.itemsize for part in parts)


def _boxes(
    leaf: jax.ShapeDtypeStruct, sharding: Sharding
) -> dict[tuple[tuple[int, int], ...], list[jax.Device]]:
    """Begin and end on each axis of the boxes that this process's devices hold, and which do."""
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        box = bounded(index or (), leaf.shape)
        devices[tuple((s.start, s.stop) for s in box)].append(device)
    return devices


def _read_leaf(
    source: Source,
    path: LeafPath,
    leaf: jax.ShapeDtypeStruct,
    sharding: Sharding,
    advance: Advance,
) -> jax.Array:
    """One parameter on its devices; what several of them hold is read once in each process.

    The host keeps no part of it for longer than it takes to hand it on.
    """
    parts = []
    for bounds, holders in _boxes(leaf, sharding).items():
        block = source.block(path, tuple(slice(*ends) for ends in bounds), leaf.dtype, advance)
        places = [SingleDeviceSharding(d, memory_kind=sharding.memory_kind) for d in holders]
        parts += jax.block_until_ready([jax.device_put(block, place) for place in places])
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, parts)


def _own_matrices(leaf: Quantised, shardings: Quantised) -> list[tuple[int, ...]]:
    """Places in a stack of the matrices that this process's devices hold some of."""
    needed = np.zeros(leaf.shape[:-2], bool)
    for sharding, part in zip(*map(jax.tree.leaves, (shardings, leaf)), strict=True):
        for index in sharding.addressable_devices_indices_map(part.shape).values():
            needed[bounded(index or (), part.shape)[:-2]] = True
    return [tuple(map(int, place)) for place in np.argwhere(needed)]


def _read_quantised(
    source: Source, path: LeafPath, leaf: Quantised, shardings: Quantised, advance: Advance
) -> Quantised:
    """A stack of matrices on their devices, as the files keep them; or else each of them is
    quantised as soon as it is read.
    """
    codes = np.empty(leaf.codes.shape, leaf.codes.dtype)
    scales = np.empty(leaf.scales.shape, leaf.scales.dtype)
    read = quantised_reader(source, path, leaf)
    places, size = _own_matrices(leaf, shardings), matrix_bytes(leaf)
    for place, (own_codes, own_scales) in in_order(read, places, lambda _: size):
        codes[place], scales[place] = own_codes, own_scales
        advance(_held_bytes(leaf))

    def put(values: np.ndarray, place: Any) -> jax.Array:
        return jax.make_array_from_callback(values.shape, place, lambda index: values[index])

    return Quantised(
        put(codes, shardings.codes), put(scales, shardings.scales), leaf.scheme, leaf.group_size
    )


def expert_reader(source: Source) -> ReadExpert:
    """What reads matrices of base experts in full precision; see `attach_tuned_experts`."""
    shapes = leaf_shapes(source.placements)

    def read(name: str, layer: int, expert: int) -> np.ndarray:
        path = ("moe_blocks", "moe", "experts", name)
        matrix = (slice(0, size) for size in shapes[path][2:])
        box = slice(layer, layer + 1), slice(expert, expert + 1), *matrix
        return source.block(path, box, np.dtype(np.float32))[0, 0]

    return read


def load_model(
    path: str | Path, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
) -> Transformer:
    """Load a model from a Hugging Face folder, a hub name, or a converted checkpoint.

    Args:
        path: a folder, or a name on the Hugging Face hub (only safetensors, `config.json` and the
            tokenizer are fetched).
        dtype: type of the parameters and of the computation.
        mesh: devices to split the parameters over; every device reads only its own part.

    Raises:
        InputError: nothing there, a damaged or missing file, tensors that do not fit
            `config.json`, or one that is not finite.
    """
    return load_base(path, dtype, mesh).model


def local_folder(path: str | Path, files: Sequence[str] = _HUB_FILES) -> Path:
    """A local folder, downloaded from the hub if `path` is a name there.

    Args:
        files: what a download fetches.

    Raises:
        InputError: it is neither.
    """
    name = str(path)
    if Path(name).is_dir():
        return Path(name)
    if isinstance(path, Path) or name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise InputError(f"{path}: no such folder")
    try:
        left = list(_NOT_FROM_HUB)
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=left))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: neither a folder nor found on the hub: {reason}") from None
