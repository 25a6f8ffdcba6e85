"""Tokens of large data, kept on disk in Arrow files, so that they are made once.

A file is named by the hash of all that its tokens depend on: what the data hold and how they are
read, the tokenizer with its chat template, and the code that makes tokens. One process makes a
file, while others of the machine wait for it; a file that is there is whole.
"""

import contextlib
import functools
import hashlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from esft_jax.data.records import size_of
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError, one_line
from esft_jax.lock import NoLocks, locked

KeptArrays = dict[str, np.ndarray]  # of one axis and of numbers

# Bytes of the data from which on their tokens are kept.
LARGE = 32 * 2**20
_DIGEST = b"sha256"
_WAIT = 0.2  # seconds between two looks at another process's work


class TokenCache:
    """A folder of kept tokens. It can be deleted at any time.

    Attributes:
        folder: where they lie.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()

    def takes(self, paths: Sequence[str], tokenizer: Tokenizer) -> bool:
        """Whether tokens are kept: of large data, if they are always the same."""
        return sum(map(size_of, paths)) >= LARGE and not tokenizer.depends_on_time

    def get(
        self, key: Mapping[str, Any], tokenizer: Tokenizer, make: Callable[[], KeptArrays]
    ) -> tuple[KeptArrays, bool]:
        """The arrays that are kept for a key, or are made and kept now, read-only.

        Without a folder to write to, they are made, with a warning.

        Args:
            key: what they depend on besides the tokenizer, as JSON.

        Returns:
            The arrays, and whether they were there already.
        """
        content = {**key, "tokenizer": tokenizer.definition_sha256, "code": _code()}
        name = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name[:32]}.arrow"
        with contextlib.ExitStack() as stack:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_alone(path))
            except (OSError, InputError) as error:
                return self._unkept(make(), error), False
            if (arrays := _read(path)) is not None:
                return arrays, True
            arrays = make()
            try:
                _write(path, arrays)
            except (OSError, pa.ArrowException) as error:
                return self._unkept(arrays, error), False
            # The file's memory is shared, and the system's to take back.
            del arrays
            return _read(path) or make(), False

    def _unkept(self, arrays: KeptArrays, error: Exception) -> KeptArrays:
        warnings.warn(
            f"data.cache: {self.folder}: tokens are not kept: {one_line(error)}", stacklevel=3
        )
        return arrays


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes from making the same file; wait for one that does."""
    lock = path.with_name(f".{path.stem}.lock")
    while True:
        with contextlib.ExitStack() as stack:
            try:
                ours = stack.enter_context(locked(lock))
            except NoLocks:  # what several processes make is the same
                ours = True
            if ours:
                yield
                return
        time.sleep(_WAIT)


def _write(path: Path, arrays: KeptArrays) -> None:
    """Each array as a list in the one row of a table, under a name that is given to whole files."""
    for rest in path.parent.glob(f".{path.stem}.*.tmp"):  # of processes that were killed
        rest.unlink(missing_ok=True)
    columns = {
        name: pa.LargeListArray.from_arrays(np.array([0, len(array)]), pa.array(array))
        for name, array in arrays.items()
    }
    table = pa.table(columns).replace_schema_metadata({_DIGEST: _digest(arrays)})
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> KeptArrays | None:
    """The arrays of a file, mapped into memory; None if there is none, or it is damaged."""
    if not path.exists():
        return None
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        arrays = {
            name: column.chunk(0).values.to_numpy(zero_copy_only=True)
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
        whole = (table.schema.metadata or {}).get(_DIGEST) == _digest(arrays)
    except (OSError, pa.ArrowException):
        whole = False
    if not whole:
        warnings.warn(f"{path}: is damaged; its tokens are made again", stacklevel=2)
        return None
    return arrays


def _digest(arrays: KeptArrays) -> bytes:
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {len(array)};".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest().encode()


@functools.cache
def _code() -> str:
    """Hash of the code that makes tokens: this package, and the libraries that it uses for it."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    for library in ("jinja2", "tokenizers"):
        digest.update(f"{library} {version(library)};".encode())
    return digest.hexdigest()
