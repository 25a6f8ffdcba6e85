"""Convert a Hugging Face checkpoint to our stacked, sharded form, one tensor in memory at a time.

Progress is kept in a journal beside the parameters, so that a conversion that was killed goes on
where it stopped.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from esft_jax.errors import InputError
from esft_jax.files import write_text_atomic
from esft_jax.hf.converted import (
    FORMAT,
    JOURNAL,
    MANIFEST,
    PARAMS,
    create_arrays,
    is_converted,
    leaf_shapes,
    orbax_metadata,
)
from esft_jax.hf.folder import copy_companions
from esft_jax.hf.source import (
    HuggingFaceSource,
    combine_digests,
    names_by_leaf,
    tensor_digest,
)
from esft_jax.hf.tensor_files import DTYPE_NAMES


def convert_checkpoint(
    source_folder: str | Path, target: str | Path, origin: str | None = None
) -> str:
    """Convert a checkpoint, or complete a conversion of it that was interrupted.

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
    digests = _open_journal(folder, _identity(source))
    by_leaf = names_by_leaf(source.placements)
    # Without loss: where a parameter's tensors differ in type, it takes a type that holds all.
    dtypes = {
        leaf: np.result_type(*{source.dtype(name) for name in names})
        for leaf, names in by_leaf.items()
    }
    arrays = create_arrays(folder, source.placements, dtypes)
    with (folder / JOURNAL).open("a", encoding="utf-8") as journal:
        for name in tqdm(source.placements, desc="convert", unit="tensor", disable=None):
            if name in digests:
                continue
            place, tensor = source.placements[name], source.tensor(name)
            digests[name] = tensor_digest(name, tensor)
            block = place.to_block(tensor).astype(dtypes[place.path])
            arrays[place.path][place.box].write(block).result()
            journal.write(json.dumps({"tensor": name, "sha256": digests[name]}) + "\n")
            journal.flush()
    copy_companions(source.folder, folder)
    write_text_atomic(folder / PARAMS / "_METADATA", orbax_metadata(leaf_shapes(source.placements)))
    fingerprint = combine_digests(digests)
    manifest = {
        "format": FORMAT,
        "source": origin or str(source_folder),
        "fingerprint": fingerprint,
        "dtypes": sorted({DTYPE_NAMES[dtype] for dtype in dtypes.values()}),
    }
    write_text_atomic(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    (folder / JOURNAL).unlink()
    return fingerprint


def _identity(source: HuggingFaceSource) -> str:
    """Tells sources apart without reading their weights: config, headers, and files' stamps."""
    stamps = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in source.files.files]
    headers = sorted(
        (name, info.file.name, info.dtype, info.shape) for name, info in source.files.items()
    )
    config = (source.folder / "config.json").read_bytes()
    return hashlib.sha256(config + repr((stamps, headers)).encode()).hexdigest()


def _open_journal(folder: Path, identity: str) -> dict[str, str]:
    """Digests of the tensors that are converted already; begins a journal in an empty folder."""
    path = folder / JOURNAL
    if (folder / MANIFEST).is_file():
        raise InputError(f"{folder}: is complete already ({MANIFEST}); expected a new folder")
    if not path.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{folder}: exists; expected a new or empty folder")
        write_text_atomic(path, json.dumps({"source": identity}) + "\n")
        return {}
    content = path.read_bytes()
    # A kill may leave half a line behind: its tensor is converted again.
    complete = content[: content.rfind(b"\n") + 1]
    first, *finished = map(json.loads, complete.splitlines())
    if first != {"source": identity}:
        raise InputError(
            f"{folder}: unfinished conversion of another source; delete it or choose a new folder"
        )
    os.truncate(path, len(complete))
    return {entry["tensor"]: entry["sha256"] for entry in finished}
