"""Reading and writing small text files so that no half-written one ever looks complete."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from esft_jax.errors import InputError

_PATIENCE = 60  # seconds; NFS, by default, keeps what a folder holds for at most so long


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 `text` under a temporary name in the same folder, then rename it to `path`."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """The same for bytes; `InputError` names the file where it cannot be written."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{target}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):  # after a failure the folder itself may be missing
            temporary.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike[str], key: str) -> None:
    """Refuse a folder that cannot be written to, or be made; the `InputError` starts with `key`."""
    path = Path(folder)
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir():
        raise InputError(f"{key}: {existing} is a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{key}: {existing}: no permission to write")


def seen(path: Path) -> bool:
    """Whether a file is there that another host has just written.

    Network file systems may take a while to tell.
    """
    for _ in range(_PATIENCE):
        with contextlib.suppress(OSError):
            os.listdir(path.parent)  # has them look
        if path.exists():
            return True
        time.sleep(1)
    return path.exists()


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file; `InputError` names it if it is missing, unreadable or not UTF-8."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from error


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; a syntax error or a repeated key is an `InputError` that starts with `where`."""

    def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        mapping = dict(pairs)
        if len(mapping) < len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise InputError(f"{where}: key {repeated!r} appears twice in one object")
        return mapping

    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError: syntax, or a number of 5000 digits
        raise InputError(f"{where}: not valid JSON ({error})") from error
