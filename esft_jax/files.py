"""Reading and writing small text files so that no half-written one ever looks complete."""

import codecs
import contextlib
import functools
import json
import os
import re
import reprlib
import stat
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from esft_jax.errors import InputError, one_line, shown

Value = TypeVar("Value")

_BLANKS = re.compile(r"[ \t\n\r]*")
_URL = re.compile(r"\s*([A-Za-z][A-Za-z0-9+.-]*):/")
_NAME_MAX, _PATH_MAX = 255, 4096  # bytes; of Linux, the shorter ones of all file systems in use

# What pydantic calls them, and what is said of them: their value, or what should have them, is not.
_WRONG_KEYS = {
    "missing": "is missing",
    "extra_forbidden": "is no key that is known here",
    "unexpected_keyword_argument": "is no key that is known here",
}
_PATIENCE = 60  # seconds; NFS, by default, keeps what a folder holds for at most so long
POINTER_BYTES = 64  # of a file, enough to know a git-lfs pointer by
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def write_text_atomic(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 `text` under a temporary name in the same folder, then rename it to `path`."""
    write_bytes_atomic(path, text.encode("utf-8"))


def write_bytes_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """The same for bytes.

    Raises:
        InputError: it cannot be written, or is a device or a FIFO, which a file would replace.
    """
    target = Path(path)
    if os.path.exists(target) and not os.path.isfile(target) and not os.path.isdir(target):
        raise InputError(f"{target}: is no regular file; expected a file, or none")
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
    # `os.path.exists`: what lies in a folder that cannot be searched is not seen, and no error.
    existing = next(p for p in (path, *path.absolute().parents) if os.path.exists(p))
    if not existing.is_dir():
        raise InputError(f"{key}: {existing} is a file; expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"{key}: {existing}: no permission to write")


def visible(folder: str | os.PathLike[str], pattern: str = "*") -> list[Path]:
    """What a folder holds by names of a pattern, sorted, without hidden files.

    Those (`._model.safetensors`, `.DS_Store`, `.ipynb_checkpoints`, ...) are the file manager's or
    another tool's: never read, and never in the way.
    """
    return sorted(path for path in Path(folder).glob(pattern) if not path.name.startswith("."))


def check_no_links(path: str | os.PathLike[str]) -> None:
    """Refuse a symbolic link at a path or below it: what is written there must stay there.

    Hidden files do not count. Folders above may be links.

    Raises:
        InputError: naming the link.
    """

    def check(path: str) -> None:
        if os.path.islink(path):
            raise InputError(
                f"{path}: is a link, and writing would lead out of its folder; expected none"
            )

    check(os.fspath(path))
    for folder, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders + [name for name in files if not name.startswith(".")]:
            check(os.path.join(folder, name))


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


def local_path(path: str) -> str:
    """A path of this machine as a user writes it, with `~` and `~USER` expanded.

    What lies there is not looked at.

    Raises:
        InputError: it is a URL, names no user's home, or is no path that the system could open.
    """
    if url := _URL.match(path):
        raise InputError(
            f"{shown(path)} is a URL; {url[1]}: is not read or written, expected a local path"
        )
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.partition("/")[0]
        raise InputError(f"{shown(path)}: no user {shown(user[1:])}; expected ./~ for such a name")
    try:
        encoded = os.fsencode(expanded)
    except UnicodeEncodeError as error:
        raise InputError(
            f"{shown(path)}: {error.object[error.start]!a} has no place in a file name here, in "
            f"{error.encoding}; expected a UTF-8 locale, or PYTHONUTF8=1"
        ) from None
    if b"\0" in encoded:
        raise InputError(f"{shown(path)} has a zero byte; expected a path")
    longest = max(map(len, encoded.split(b"/")))
    if longest > _NAME_MAX or len(encoded) >= _PATH_MAX:
        raise InputError(
            f"{shown(path)} is longer than a path may be; expected at most {_PATH_MAX - 1} bytes, "
            f"and {_NAME_MAX} between two slashes"
        )
    return expanded


def check_file(path: str | os.PathLike[str]) -> None:
    """Refuse what is no file to read: missing, a folder, or a FIFO, which would be waited for.

    Raises:
        InputError: naming the path.
    """
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "no regular file"
        raise InputError(f"{path}: is {kind}; expected a file")


def reason(error: OSError | ValueError) -> str:
    """What the operating system says of a failure, without the path."""
    return (isinstance(error, OSError) and error.strerror) or str(error)


def check_not_pointer(path: str | os.PathLike[str], begin: bytes) -> None:
    """Refuse what git-lfs leaves in place of a large file that it has not fetched.

    Args:
        begin: the first bytes of the file.

    Raises:
        InputError: naming the file and the command that fetches it.
    """
    if begin.startswith(_LFS_POINTER):
        raise InputError(
            f"{path}: is a git-lfs pointer, not the file itself; `git lfs pull` in its repository "
            "fetches it"
        )


def read_text(path: str | os.PathLike[str]) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        InputError: it is missing, unreadable, no file, not UTF-8 or a git-lfs pointer; names it.
    """
    check_file(path)
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    check_not_pointer(path, content)
    try:
        return content.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. Raises an `InputError` that names the file; see `parse_json`."""
    return parse_json(read_text(path), str(path))


def read_json_lines(
    path: str | os.PathLike[str], *, growing: bool = False
) -> Iterator[tuple[str, Any]]:
    """The place, `path:line`, and the value of each line of a JSON Lines file.

    A line is in memory at a time; blank ones are none.

    Args:
        growing: what follows the last end of a line is left out: it is being written, or was when
            its process was killed.

    Raises:
        InputError: as `read_text` does, and for the first line that is no JSON, by its number.
    """
    check_file(path)
    try:
        with open(path, "rb") as file:
            yield from parse_json_lines(file, path, growing=growing)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error


def parse_json_lines(
    lines: Iterable[bytes], path: str | os.PathLike[str], *, growing: bool = False
) -> Iterator[tuple[str, Any]]:
    """The same of the lines of an open file."""
    for number, line in enumerate(lines, 1):
        if growing and not line.endswith(b"\n"):
            return
        if number == 1:
            check_not_pointer(path, line)
            line = line.removeprefix(codecs.BOM_UTF8)
        where = f"{path}:{number}"
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {error.start} of the line is not UTF-8 text"
            ) from error
        if text.strip():
            yield where, parse_json(text, where)


def parse_json(text: str, where: str) -> Any:
    """Parse JSON; a syntax error or a repeated key is an `InputError` that starts with `where`."""
    with _json_faults(where):
        return json.loads(text, object_pairs_hook=_unique_keys)


def parse_json_items(text: str, path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """The place, `path:number`, and the value of each item of a list, one at a time.

    Raises:
        InputError: for the first item that is no JSON, by its number, which counts from 1.
    """
    decoder = json.JSONDecoder(object_pairs_hook=_unique_keys)
    begin, number = _skip(text, 0), 0
    if text[begin : begin + 1] != "[":
        raise InputError(f"{path}: expected a list of JSON objects")
    begin = _skip(text, begin + 1)
    while number or text[begin : begin + 1] != "]":
        number += 1
        where = f"{path}:{number}"
        with _json_faults(where):
            value, end = decoder.raw_decode(text, begin)
        yield where, value
        end = _skip(text, end)
        if text[end : end + 1] == "]":
            begin = end
            break
        if text[end : end + 1] != ",":
            raise InputError(
                f"{where}: not valid JSON: expected a comma after it, or the list's end"
            )
        begin = _skip(text, end + 1)
    if rest := text[begin + 1 :].strip():
        raise InputError(f"{path}: {reprlib.repr(rest)} after the list; expected its end")


def _skip(text: str, begin: int) -> int:
    """Where the white space ends that begins somewhere."""
    found = _BLANKS.match(text, begin)
    assert found is not None
    return found.end()


class _RepeatedKey(Exception):
    """A key that appears twice in one object."""


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _RepeatedKey(next(key for key, count in counts.items() if count > 1))
    return mapping


@contextlib.contextmanager
def _json_faults(where: str) -> Iterator[None]:
    """What is wrong with JSON, as an `InputError` that starts with a place."""
    try:
        yield
    except _RepeatedKey as error:
        key = error.args[0]
        raise InputError(f"{where}: key {key!r} appears twice in one object") from error
    except RecursionError as error:
        raise InputError(f"{where}: not valid JSON: nested too deeply") from error
    except ValueError as error:  # syntax, or a number of 5000 digits
        raise InputError(f"{where}: not valid JSON: {one_line(error)}") from error


def checked(kind: type[Value], value: object, where: str) -> Value:
    """A parsed value as the type that a file of this package is declared to hold.

    Types are strict: no text stands for a number. Numbers are finite.

    Args:
        kind: a type that pydantic knows; of a dataclass or `TypedDict`, all its keys are expected
            and no others.
        value: what `parse_json` returned.
        where: what the message begins with: the file, and the line if there are several.

    Raises:
        InputError: naming the key, what was found and what was expected.
    """
    hashable: Any = kind
    try:
        for keys, number in _numbers(value):
            if not abs(number) <= sys.float_info.max:  # an integer may be larger, too
                place = ": ".join([where, ".".join(keys)] if keys else [where])
                raise InputError(f"{place}: is {shown(number)}; expected a finite number")
        # Of Python's own values, pydantic's strict mode would take no dictionary for a dataclass.
        return _adapter(hashable).validate_json(json.dumps(value), strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        mistake = error.errors(include_url=False)[0]
        # A key that is wrong itself has `[key]` after it.
        key = ".".join(str(part) for part in mistake["loc"] if part != "[key]")
        message = mistake["msg"].removeprefix("Value error, ")
        expected = re.sub("^(Input should be|String should)", "expected", message)
        found = _WRONG_KEYS.get(mistake["type"], f"is {reprlib.repr(mistake['input'])}; {expected}")
        raise InputError(": ".join(filter(None, (where, key, found)))) from None
    except RecursionError:
        raise InputError(f"{where}: nested too deeply") from None


def _numbers(value: object, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number in a parsed value, with the keys that lead to it."""
    if isinstance(value, int | float):
        yield keys, value
    items = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield from _numbers(item, (*keys, str(key)))


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind)
