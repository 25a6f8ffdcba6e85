"""Writing folders in Hugging Face layout: weights in shards, and the files beside them."""

import contextlib
import glob
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from esft_jax.checkpoint.tensor_files import DTYPE_NAMES
from esft_jax.data.chat_template import named_templates
from esft_jax.errors import InputError
from esft_jax.files import POINTER_BYTES, check_file, check_not_pointer, visible

# What belongs to a model besides its weights.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# What an adapter or a model consists of.
_RESULT = re.compile(
    r".+\.safetensors(\.index\.json)?|manifest\.json|expert_cfg\.json|adapter_config\.json|"
    + "|".join(map(re.escape, (*COMPANIONS, "README.md")))
)


def is_result(name: str) -> bool:
    """Whether a file of this name is a part of an adapter or a model."""
    return _RESULT.fullmatch(name) is not None


class TensorSpec(NamedTuple):
    """A tensor before its data is there."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data."""
        return self.dtype.itemsize * int(np.prod(self.shape))


def copy_companions(source: Path, target: Path) -> None:
    """Copy `config.json`, tokenizer and the like, as far as they exist.

    Raises:
        InputError: one is a git-lfs pointer, no file, or a link that leads nowhere.
    """
    named = (str(path.relative_to(source)) for path in named_templates(source))
    for name in (*COMPANIONS, *named):
        if os.path.lexists(source / name):
            check_file(source / name)
            (target / name).parent.mkdir(exist_ok=True)
            with (source / name).open("rb") as file:
                check_not_pointer(source / name, file.read(POINTER_BYTES))
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `target` that becomes it when the block ends without an error.

    What killed writers left beside it is removed. Of two writers at one time the later one wins,
    and the other one fails. Hidden files of a folder that is replaced stay.

    Args:
        target: must be new or empty, unless `replace` is set.
        replace: an older result is replaced once the new one is complete.

    Raises:
        InputError: see `make_way`; or the system failed to write.
    """
    make_way(target, replace=replace)
    # Not a link itself. Folders above may be, and `x/..` has another name.
    target = target.resolve()

    def unused() -> Path:
        return target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")

    for left in target.parent.glob(f".{glob.escape(target.name)}.{'?' * 8}.tmp"):
        with contextlib.suppress(OSError):
            # Renamed first: a writer that lives must not finish a folder that lacks some files.
            shutil.rmtree(left.rename(unused()), ignore_errors=True)
    temporary, old = unused(), target.with_name(f".{target.name}.old")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from None
    try:
        yield temporary
        make_way(target, replace=replace)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)  # of a writer killed just below
            target.rename(old)
        temporary.rename(target)
        if old.exists():
            for path in old.glob(".*"):
                path.rename(target / path.name)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not temporary.exists():
            raise InputError(
                f"{target}: another process writes it; expected one at a time"
            ) from None
        raise InputError(f"{target}: cannot be written: {error.strerror or error}") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_way(target: Path, *, replace: bool = False) -> None:
    """Check that a new folder may take a place.

    Args:
        replace: an older result, with nothing else in it, may be there.

    Raises:
        InputError: something else is there, a link among others.
    """
    if target.is_symlink():
        raise InputError(f"{target}: is a link; expected a new folder, to be written in its place")
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: exists; expected a new or empty folder")
    if target.samefile("."):
        raise InputError(
            f"{target}: is the current folder, which nothing can take the place of; expected a new "
            "folder, within it or elsewhere"
        )
    held = visible(target)
    if held and not replace:
        raise InputError(f"{target}: exists; expected a new or empty folder")
    for path in held:
        if not is_result(path.name) or path.is_dir():
            raise InputError(
                f"{path}: is no part of a result, which would take the place of {target}; "
                "expected a new folder, or an older result"
            )


def make_way(target: Path, *, replace: bool = False) -> None:
    """Remove an empty folder, for a new one to take its place.

    Raises:
        InputError: see `check_way`; or an empty folder cannot be removed, as a mount point.
    """
    check_way(target, replace=replace)
    if not target.exists() or any(target.iterdir()):
        return
    try:
        target.resolve().rmdir()
    except OSError as error:
        raise InputError(
            f"{target}: cannot be replaced: {error.strerror}; expected a new folder, within it "
            "or elsewhere"
        ) from error


def write_tensors(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, np.ndarray]],
    max_bytes: int | None,
    stem: str = "model",
) -> None:
    """Write `model.safetensors`, or shards of at most `max_bytes` with an index.

    Headers come first in the format, so types and shapes must be known before the data; each
    tensor is written as it arrives and then forgotten.

    Args:
        specs: the tensors, in the order they arrive in.
        max_bytes: None for a single file.
        stem: what the names of the files begin with.
    """
    shards = _plan_shards(specs, max_bytes)
    arriving = iter(tensors)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"{stem}.safetensors"
        if len(shards) > 1:
            file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        with (folder / file).open("wb") as out:
            _write_header(out, {name: specs[name] for name in names})
            for expected in names:
                name, tensor = next(arriving)
                assert (name, TensorSpec(tensor.dtype, tensor.shape)) == (expected, specs[name])
                out.write(np.ascontiguousarray(tensor).view(np.uint8).data)
                weight_map[name] = file
            out.flush()
            os.fsync(out.fileno())  # complete on the disk before the folder has its name
    if len(shards) > 1:
        size = sum(spec.num_bytes for spec in specs.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _plan_shards(specs: Mapping[str, TensorSpec], max_bytes: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and max_bytes is not None and used + spec.num_bytes > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += spec.num_bytes
    return shards


def _write_header(out: BinaryIO, specs: Mapping[str, TensorSpec]) -> None:
    """Header of the safetensors format: its length, then JSON, padded to a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
