"""Convert a Hugging Face checkpoint to our stacked, sharded form.

A few tensors are in memory at a time, however large the model. Several processes may share the
work. Each notes in a journal beside the parameters what it has finished, so that a conversion that
was killed goes on where it stopped, with any number of them.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from esft_jax.checkpoint.arrays import chunk_boxes, write_array
from esft_jax.checkpoint.converted import (
    CARRIED,
    FORMAT,
    MANIFEST,
    PARAMS,
    ConvertedSource,
    create_arrays,
    is_converted,
    leaf_shapes,
    orbax_metadata,
)
from esft_jax.checkpoint.folder import TensorSpec, copy_companions, write_tensors
from esft_jax.checkpoint.journal import Journal
from esft_jax.checkpoint.quantise import check_quantisation, quantise_converted
from esft_jax.checkpoint.source import HuggingFaceSource, combine_digests
from esft_jax.checkpoint.tensor_files import DTYPE_NAMES, common_dtype, is_finite
from esft_jax.errors import InputError
from esft_jax.families import tensor_table
from esft_jax.families.tensors import LeafPath
from esft_jax.files import write_text_atomic
from esft_jax.ops.quantisation import Quantisation
from esft_jax.processes import any_process, on_all_processes

_MAX_SHARD_BYTES = 4 << 30


def convert_checkpoint(
    source_folder: str | Path,
    target: str | Path,
    origin: str | None = None,
    quantisations: Sequence[Quantisation] = (),
) -> str:
    """Convert a checkpoint, or complete a conversion of it that was interrupted.

    On several processes all must call it; each converts a share.

    Args:
        source_folder: folder in Hugging Face layout.
        target: folder to write; new, empty, or an unfinished conversion of the same source; a
            finished one of the same weights if there are `quantisations`.
        origin: what the manifest names as the source, if not the folder.
        quantisations: what is kept quantised, too; see `quantise_converted`.

    Returns:
        The fingerprint of the base.

    Raises:
        InputError: the source is no complete checkpoint, or the target holds something else; or a
            matrix cannot be quantised so.
    """
    folder, source_folder = Path(target), Path(source_folder)
    origin = origin or str(source_folder)
    if is_converted(source_folder):
        raise InputError(f"{source_folder}: is a converted checkpoint already")
    source = HuggingFaceSource(source_folder)
    for quantisation in quantisations:
        check_quantisation(source, quantisation)
    if quantisations and any_process((folder / MANIFEST).is_file()):
        _check_same(ConvertedSource(folder), source, origin)
    else:
        _convert(source, folder, origin)
    for quantisation in quantisations:
        quantise_converted(folder, quantisation, source)
    return ConvertedSource(folder).fingerprint


def _check_same(converted: ConvertedSource, source: HuggingFaceSource, origin: str) -> None:
    """Check that a finished conversion is one of a source; of another name, by its weights."""
    if converted.origin != origin and converted.fingerprint != source.fingerprint:
        raise InputError(
            f"{converted.folder}: is a conversion of {converted.origin}, with other weights than "
            f"{origin}; expected a new folder, or that source"
        )


def _convert(source: HuggingFaceSource, folder: Path, origin: str) -> None:
    dtypes = _leaf_dtypes(source)
    process = jax.process_index()
    with on_all_processes(f"{folder}: conversion"):
        if process == 0:
            _begin(folder, source)
    with on_all_processes(f"{folder}: conversion"):
        _convert_share(source, folder, dtypes, process, jax.process_count())
    with on_all_processes(f"{folder}: conversion"):
        if process == 0:
            _finish(source, folder, dtypes, origin)


def _begin(folder: Path, source: HuggingFaceSource) -> None:
    """Begin a conversion in an empty folder, or go on with one.

    Raises:
        InputError: the folder holds something else.
    """
    if (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: is complete already ({MANIFEST}); expected a new folder")
    _journal(folder, source).begin(_identity(source))


def _journal(folder: Path, source: HuggingFaceSource) -> Journal:
    return Journal(folder, source.placements, str(source.folder))


def _convert_share(
    source: HuggingFaceSource,
    folder: Path,
    dtypes: Mapping[LeafPath, np.dtype],
    process: int,
    processes: int,
) -> None:
    """Convert this process's share of the tensors that are not yet; note each that is on disk."""
    arrays = create_arrays(folder, source.placements, dtypes)

    def convert(name: str) -> str:
        place, digest = source.placements[name], source.digest(name)
        if not is_finite(source.tensor(name)):  # no command would load it
            raise InputError(
                f"{source.folder}: tensor {name!r} has values that are no finite numbers"
            )
        path, array = folder / PARAMS / ".".join(place.path), arrays[place.path]
        for box in chunk_boxes(array, place.box):
            write_array(path, array, box, source.part(name, box, dtypes[place.path]))
        return digest

    journal = _journal(folder, source)
    journal.work_off(convert, source.num_bytes, process, processes, "convert")


def _finish(
    source: HuggingFaceSource, folder: Path, dtypes: Mapping[LeafPath, np.dtype], origin: str
) -> None:
    """Write what belongs to all tensors; the manifest last, for it says that all is there."""
    copy_companions(source.folder, folder)
    if source.carried:
        carried, target = source.carried, folder / CARRIED
        target.mkdir(exist_ok=True)
        specs = {n: TensorSpec(carried.dtype(n), info.shape) for n, info in carried.items()}
        write_tensors(target, specs, ((n, carried.read(n)) for n in specs), _MAX_SHARD_BYTES)
    write_text_atomic(folder / PARAMS / "_METADATA", orbax_metadata(leaf_shapes(source.placements)))
    journal = _journal(folder, source)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "source": origin,
        "fingerprint": combine_digests(journal.digests()),
        "dtypes": sorted({DTYPE_NAMES[dtype] for dtype in dtypes.values()}),
        "carried": sorted(source.carried),
    }
    if source.fused and not tensor_table(source.config).experts.stored_fused:
        manifest["fused"] = True
    write_text_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    journal.end()


def _leaf_dtypes(source: HuggingFaceSource) -> dict[LeafPath, np.dtype]:
    """Without loss: where a parameter's tensors differ in type, it takes a type that holds all."""
    return {
        leaf: common_dtype(source.dtype(name) for name in names)
        for leaf, names in source.by_leaf.items()
    }


def _identity(source: HuggingFaceSource) -> str:
    """Tells sources apart without reading their weights: config, headers, and files' stamps."""
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.files.files]
    headers = sorted(
        (name, info.file.name, info.dtype, info.shape) for name, info in source.files.items()
    )
    config = (source.folder / "config.json").read_bytes()
    return hashlib.sha256(config + repr((stamps, headers)).encode()).hexdigest()
