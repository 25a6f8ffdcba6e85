"""Records of files and of datasets of the hub, each with its place.

A path is that of a local file (`KINDS`, compressed or not) or of a folder of such files, a pattern
that some have (`data/*.jsonl.gz`), or a dataset of the Hugging Face hub:
`owner/name[/configuration][:split][@revision]`, split `train` where none is named.
"""

import contextlib
import csv
import glob
import hashlib
import io
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from esft_jax.data.layouts import short
from esft_jax.errors import InputError, one_line
from esft_jax.files import (
    POINTER_BYTES,
    check_file,
    check_not_pointer,
    parse_json_items,
    parse_json_lines,
    reason,
    visible,
)
from esft_jax.progress import Advance

# With its owner: the library takes `json` and its like for "all such files in this folder".
_HUB_NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(/(?P<configuration>\w[\w.-]*))?"
    r"(:(?P<split>[\w.\[\]%+:-]+))?(@(?P<revision>\w[\w./-]*))?"
)
_COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
# What makes a file of another kind readable.
_OTHER_KINDS = {
    ".arrow": "`datasets.Dataset.from_file(FILE).to_parquet(NEW)` writes Parquet",
    ".txt": 'write its texts as {"text": ...}, one in each line of a .jsonl file',
    **dict.fromkeys(
        (".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz"),
        "expected it as .gz or .zst, or as it is without",
    ),
}


def expand(paths: Sequence[str]) -> list[str]:
    """The files and datasets of the hub that paths name, those of a folder or pattern by name.

    Raises:
        InputError: a folder has no file to read, or some of several kinds; nothing has the pattern.
    """
    return [file for path in paths for file in _expanded(path)]


def _expanded(path: str) -> list[str]:
    if os.path.isdir(path):
        found = [str(file) for file in visible(path) if _kind(file) in KINDS and file.is_file()]
        kinds = sorted({_kind(Path(file)) for file in found})
        if not found:
            expected = ", ".join(KINDS)
            raise InputError(f"{path}: is a folder without files to read; expected {expected}")
        if len(kinds) > 1:
            raise InputError(
                f"{path}: is a folder with files of several kinds ({', '.join(kinds)}), which "
                f"may hold the same; expected one kind, or a pattern such as {path}/*{kinds[0]}"
            )
        return found
    if not os.path.lexists(path) and not _on_hub(path) and glob.has_magic(path):
        found = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        if not found:
            raise InputError(f"{path}: no file has a name of this pattern")
        return found
    return [path]


def read_records(
    paths: Sequence[str], advance: Advance | None = None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place and the record of all that paths name, in order.

    A place is `path:number`: the line of a file of lines (of CSV the first of the record), else
    which of the rows or items it is; all count from 1.

    Args:
        paths: see the module.
        advance: receives how many bytes more are read, of those that `size_of` counts.

    Raises InputError naming file and number of what is no record, and files without any.
    """
    for path in expand(paths):
        empty = True
        for where, record in _open(path, advance or _unwatched):
            if not isinstance(record, dict):
                raise InputError(f"{where}: is {short(record)}; expected a JSON object")
            empty = False
            yield where, record
        if empty:
            raise InputError(f"{path}: holds no examples; expected at least one")


def source_sha256(path: str) -> str:
    """SHA-256 of the whole file; of its rows as JSON lines for a hub dataset."""
    if not _on_hub(path):
        check_file(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for row in _hub_rows(path):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def size_of(path: str) -> int:
    """Bytes of a file; of a dataset of the hub, in memory."""
    if not _on_hub(path):
        return os.path.getsize(path)
    with _hub_faults(path):
        size: int = _hub_dataset(path).data.nbytes
        return size


def _kind(path: Path) -> str:
    """The suffix that says how to read a file; not that of its compression."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _unwatched(_: int) -> None:
    """Nobody asks how far reading is."""


def _open(path: str, advance: Advance) -> Iterator[tuple[str, Any]]:
    """The place and the value of each line, row or item."""
    if _on_hub(path):
        rows = _hub_rows(path, advance)
        return ((f"{path}:{number}", row) for number, row in enumerate(rows, 1))
    check_file(path)
    kind = _kind(Path(path))
    if kind not in KINDS:
        advice = _OTHER_KINDS.get(kind, "what has a record in each line is .jsonl")
        raise InputError(
            f"{path}: unknown kind of file {kind!r}; expected {', '.join(KINDS)}, or one of these "
            f"with {' or '.join(_COMPRESSED)}; {advice}"
        )
    return _read(path, KINDS[kind], advance)


def _read(
    path: str, read: Callable[[str, IO[bytes]], Iterator[tuple[str, Any]]], advance: Advance
) -> Iterator[tuple[str, Any]]:
    compression = _COMPRESSED.get(Path(path).suffix.lower())
    try:
        with contextlib.ExitStack() as stack:
            file: IO[bytes] = stack.enter_context(open(path, "rb"))
            stored, position = file, 0
            check_not_pointer(path, file.read(POINTER_BYTES))
            file.seek(0)
            if compression is not None:
                from esft_jax.data.arrow import decompressed

                file = stack.enter_context(decompressed(file, compression))
            for found in read(path, file):
                yield found
                if (now := stored.tell()) > position:
                    advance(now - position)
                    position = now
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {reason(error)}") from error


def _json_records(path: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    """Of a list, or, as many tools write them too, of lines."""
    content = file.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8 text") from error
    if text.lstrip().startswith("{"):
        del text
        return parse_json_lines(io.BytesIO(content), path)
    del content
    return parse_json_items(text, path)


def _json_lines(path: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    return parse_json_lines(file, path)


def _csv_records(path: str, file: IO[bytes], delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    """The rows below the header; all values are texts."""
    csv.field_size_limit(sys.maxsize)
    rows = csv.reader(
        io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=delimiter, strict=True
    )
    header: list[str] | None = None
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise InputError(f"{path}:{number}: not valid CSV: {error}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: from line {number} on: not UTF-8 text") from error
        if row is None:
            return
        if not row:
            continue
        if header is None:
            header = row
            if repeated := [name for name in header if header.count(name) > 1]:
                raise InputError(f"{path}: column {repeated[0]!r} appears twice")
        elif len(row) != len(header):
            raise InputError(
                f"{path}:{number}: has {len(row)} values; expected {len(header)}, as the header has"
            )
        else:
            yield f"{path}:{number}", dict(zip(header, row, strict=True))


def _tsv_records(path: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    return _csv_records(path, file, "\t")


def _parquet_records(path: str, file: IO[bytes]) -> Iterator[tuple[str, Any]]:
    from esft_jax.data.arrow import parquet_rows

    return ((f"{path}:{number}", row) for number, row in enumerate(parquet_rows(file, path), 1))


KINDS: dict[str, Callable[[str, IO[bytes]], Iterator[tuple[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_records,
    ".csv": _csv_records,
    ".tsv": _tsv_records,
    ".parquet": _parquet_records,
}


class _HubName(NamedTuple):
    repository: str
    configuration: str | None
    split: str
    revision: str | None


def _hub_name(path: str) -> _HubName | None:
    """What a path names on the hub; None if it is no such name."""
    found = _HUB_NAME.fullmatch(path)
    if found is None or _kind(Path(path)) in (*KINDS, *_OTHER_KINDS):
        return None
    return _HubName(
        found["repository"], found["configuration"], found["split"] or "train", found["revision"]
    )


def _on_hub(path: str) -> bool:
    """Whether a path names a dataset of the hub: it could, and nothing of this name is here."""
    return not os.path.lexists(path) and _hub_name(path) is not None


def _hub_rows(path: str, advance: Advance = _unwatched) -> Iterator[dict[str, Any]]:
    from esft_jax.data.arrow import BATCH_ROWS, table_rows

    with _hub_faults(path):
        # As it is stored: what stands for an image needs no library that opens it.
        dataset = _hub_dataset(path)
        tables = dataset.with_format("arrow").iter(BATCH_ROWS)
        for row in table_rows(tables, path):
            yield row
            advance(dataset.data.nbytes // len(dataset))


def _hub_dataset(path: str) -> Any:
    """The library's dataset, which lies in a cache of its own once it was asked for."""
    name = _hub_name(path)
    assert name is not None
    if os.path.lexists(name.repository):  # the library would read it instead of the hub's
        raise InputError(
            f"{path}: {name.repository} is here, too; expected a local file or folder, or the "
            "name of a dataset of the hub that no local file or folder has"
        )
    import datasets  # takes a second to import, and files never need it

    return datasets.load_dataset(
        name.repository, name.configuration, split=name.split, revision=name.revision
    )


@contextlib.contextmanager
def _hub_faults(path: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # network, name, split: all are for the user to mend
        raise InputError(
            f"{path}: neither a local file nor a dataset that loads from the hub: {one_line(error)}"
        ) from error
