"""Convert a Hugging Face checkpoint to our stacked, sharded form.

A few tensors are in memory at a time, however large the model. Several processes may share the
work. Each notes in a journal beside the parameters what it has finished, so that a conversion that
was killed goes on where it stopped, with any number of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import pydantic
from tqdm import tqdm

from esft_jax.checkpoint.converted import (
    CARRIED,
    FORMAT,
    JOURNAL,
    MANIFEST,
    PARAMS,
    ConvertedSource,
    chunk_boxes,
    create_arrays,
    is_converted,
    leaf_shapes,
    orbax_metadata,
    stored,
)
from esft_jax.checkpoint.folder import TensorSpec, copy_companions, write_tensors
from esft_jax.checkpoint.source import HuggingFaceSource, combine_digests
from esft_jax.checkpoint.streaming import in_order, share
from esft_jax.checkpoint.tensor_files import DTYPE_NAMES, common_dtype, is_finite
from esft_jax.errors import InputError
from esft_jax.families import tensor_table
from esft_jax.families.tensors import LeafPath
from esft_jax.files import (
    check_no_links,
    checked,
    read_json_lines,
    visible,
    write_text_atomic,
)
from esft_jax.processes import on_all_processes

_MAX_SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class _Begun:
    """First line of a journal: what is converted, see `_identity`."""

    source: str


@dataclass(frozen=True)
class _Finished:
    """A line of a journal: a tensor whose chunks are on the disk, and its hash."""

    tensor: str
    sha256: Annotated[str, pydantic.Field(pattern="^[0-9a-f]{64}$")]


def convert_checkpoint(
    source_folder: str | Path, target: str | Path, origin: str | None = None
) -> str:
    """Convert a checkpoint, or complete a conversion of it that was interrupted.

    On several processes all must call it; each converts a share.

    Args:
        source_folder: folder in Hugging Face layout.
        target: folder to write; new, empty, or an unfinished conversion of the same source.
        origin: what the manifest names as the source, if not the folder.

    Returns:
        The fingerprint of the base.

    Raises:
        InputError: the source is no complete checkpoint, or the target holds something else.
    """
    folder, source_folder = Path(target), Path(source_folder)
    if is_converted(source_folder):
        raise InputError(f"{source_folder}: is a converted checkpoint already")
    source = HuggingFaceSource(source_folder)
    dtypes = _leaf_dtypes(source)
    process = jax.process_index()
    with on_all_processes(f"{folder}: conversion"):
        if process == 0:
            _begin(folder, source)
    with on_all_processes(f"{folder}: conversion"):
        _convert_share(source, folder, dtypes, process, jax.process_count())
    with on_all_processes(f"{folder}: conversion"):
        if process == 0:
            _finish(source, folder, dtypes, origin or str(source_folder))
    return ConvertedSource(folder).fingerprint


def _begin(folder: Path, source: HuggingFaceSource) -> None:
    """Begin a journal in an empty folder, or gather those of the processes that were here before.

    Raises:
        InputError: the folder holds something else.
    """
    if (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: is complete already ({MANIFEST}); expected a new folder")
    if folder.is_symlink():
        raise InputError(f"{folder}: is a link; expected a new or empty folder")
    check_no_links(folder)
    begin = _Begun(_identity(source))
    entries: list[_Begun | _Finished] = [begin]
    if (folder / JOURNAL).is_file():
        begun, finished = _read_journals(source, _journals(folder))
        if begun != [begin]:
            raise InputError(
                f"{folder}: unfinished conversion of another source; delete it or choose a new "
                "folder"
            )
        entries += finished
    elif folder.exists() and (not folder.is_dir() or visible(folder)):
        raise InputError(f"{folder}: exists; expected a new or empty folder")
    write_text_atomic(folder / JOURNAL, "".join(map(_line, entries)))
    for path in visible(folder, _process_journal("*")):
        path.unlink()


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
        array = arrays[place.path]
        for box in chunk_boxes(array, place.box):
            block = source.part(name, box, dtypes[place.path])
            with stored(folder / PARAMS / ".".join(place.path), "cannot be written"):
                array[box].write(block, can_reference_source_data_indefinitely=True).result()
        return digest

    # Not what others have noted since: all processes must divide the same tensors among them.
    finished = _digests(source, [folder / JOURNAL])
    left = [name for name in source.placements if name not in finished]
    names = share(left, source.num_bytes, process, processes)
    with (
        (folder / _process_journal(process)).open("w", encoding="utf-8") as journal,
        tqdm(
            desc="convert",
            total=sum(map(source.num_bytes, names)),
            unit="B",
            unit_scale=True,
            disable=True if process else None,  # None: shown on terminals only
        ) as progress,
    ):
        for name, digest in in_order(convert, names, source.num_bytes):
            journal.write(_line(_Finished(name, digest)))
            journal.flush()
            progress.update(source.num_bytes(name))


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
    digests = _digests(source, _journals(folder))
    assert digests.keys() == source.placements.keys()
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "source": origin,
        "fingerprint": combine_digests(digests),
        "dtypes": sorted({DTYPE_NAMES[dtype] for dtype in dtypes.values()}),
        "carried": sorted(source.carried),
    }
    if source.fused and not tensor_table(source.config).experts.stored_fused:
        manifest["fused"] = True
    write_text_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    for path in _journals(folder):
        path.unlink()


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


def _process_journal(process: int | str) -> str:
    return f"conversion-{process}.jsonl"


def _journals(folder: Path) -> list[Path]:
    """What earlier attempts have finished, and what each process of this one has."""
    return [folder / JOURNAL, *visible(folder, _process_journal("*"))]


def _line(entry: "_Begun | _Finished") -> str:
    return json.dumps(dataclasses.asdict(entry)) + "\n"


def _read_journals(
    source: HuggingFaceSource, paths: Iterable[Path]
) -> tuple[list["_Begun"], list["_Finished"]]:
    """Entries of journals. A kill may have left half a line at the end of each.

    Raises:
        InputError: another line is broken; names it.
    """
    begun: list[_Begun] = []
    finished: list[_Finished] = []
    for path in paths:
        for where, value in read_json_lines(path, growing=True):
            if isinstance(value, dict) and "source" in value:
                begun.append(checked(_Begun, value, where))
            else:
                finished.append(checked(_Finished, value, where))
                if finished[-1].tensor not in source.placements:
                    raise InputError(
                        f"{where}: tensor: {finished[-1].tensor!r} is none of {source.folder}"
                    )
    return begun, finished


def _digests(source: HuggingFaceSource, paths: Iterable[Path]) -> dict[str, str]:
    """Digests of the tensors that are noted as converted."""
    return {entry.tensor: entry.sha256 for entry in _read_journals(source, paths)[1]}
