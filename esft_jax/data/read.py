"""Reads chat and text examples, and says exactly where one is wrong.

A path is a local ``.jsonl`` or ``.parquet`` file, or the name of a Hugging Face dataset, as
``owner/name`` or ``owner/name:split`` (split ``train`` where none is named).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft_jax.data.chat_template import Message
from esft_jax.errors import InputError, one_line

ROLES = ("system", "user", "assistant")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.\[\]%-]+)?")


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation with at least one assistant message to learn, and the place it came from."""

    where: str
    messages: list[Message]


@dataclass(frozen=True, slots=True)
class TextExample:
    """A document, and the place it came from."""

    where: str
    text: str


def read_chat(paths: Sequence[str]) -> Iterator[ChatExample]:
    """Yields ``{"messages": [{"role", "content", "mask"?}, ...]}`` records; other keys are free.

    Raises InputError naming file, line and key of the first record that is not one.
    """
    for where, record in _records(paths):
        yield ChatExample(where, _messages(where, record))


def read_text(paths: Sequence[str]) -> Iterator[TextExample]:
    """Yields ``{"text": ...}`` records; other keys are free.

    Raises InputError naming file, line and key of the first record that is not one.
    """
    for where, record in _records(paths):
        if "text" not in record:
            raise InputError(f'{where}: text: missing; expected {{"text": ...}}')
        yield TextExample(where, _string(where, "text", record["text"]))


def check_unicode(where: str, key: str, text: str) -> None:
    """Raises InputError on half of a surrogate pair, which JSON can say and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {key}: half of a surrogate pair at character {error.start}; "
            "expected valid Unicode"
        ) from error


def source_sha256(path: str) -> str:
    """SHA-256 of the whole file; of its rows as JSON lines for a hub dataset."""
    if Path(path).is_file():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for row in _hub_rows(path):
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def _messages(where: str, record: dict[str, Any]) -> list[Message]:
    turns = record.get("messages")
    if not isinstance(turns, list) or not turns:
        found = "missing" if "messages" not in record else f"is {_short(turns)}"
        raise InputError(f'{where}: messages: {found}; expected a list of {{"role", "content"}}')
    messages: list[Message] = []
    for i, turn in enumerate(turns):
        key = f"messages[{i}]"
        if not isinstance(turn, dict):
            raise InputError(f"{where}: {key}: is {_short(turn)}; expected an object")
        for name in ("role", "content"):
            if name not in turn:
                raise InputError(f"{where}: {key}.{name}: missing; expected a string")
        role, mask = turn["role"], turn.get("mask")
        if role not in ROLES:
            raise InputError(
                f"{where}: {key}.role: is {_short(role)}; expected one of {', '.join(ROLES)}"
            )
        message = Message(role=role, content=_string(where, f"{key}.content", turn["content"]))
        if mask is not None:  # Parquet has a null where the key is left out
            if mask not in (0, 1):  # True and False included
                raise InputError(f"{where}: {key}.mask: is {_short(mask)}; expected true or false")
            if mask and role != "assistant":
                raise InputError(
                    f"{where}: {key}.mask: is true on a {role} message; "
                    "only assistant messages can be learned"
                )
            message["mask"] = bool(mask)
        messages.append(message)
    if not any(m["role"] == "assistant" and m.get("mask", True) for m in messages):
        raise InputError(
            f"{where}: messages: no target; expected at least one assistant message "
            "without mask: false"
        )
    return messages


def _string(where: str, key: str, value: object) -> str:
    if not isinstance(value, str):
        raise InputError(f"{where}: {key}: is {_short(value)}; expected a string")
    check_unicode(where, key, value)
    return value


def _records(paths: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (place, record) over all sources; places count from 1."""
    for path in paths:
        number = 0
        for number, record in _open(path):
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: is {_short(record)}; expected a JSON object")
            yield f"{path}:{number}", record
        if not number:
            raise InputError(f"{path}: holds no examples; expected at least one")


def _open(path: str) -> Iterator[tuple[int, Any]]:
    local, suffix = Path(path), Path(path).suffix
    if local.is_dir():
        raise InputError(f"{path}: is a folder; expected a .jsonl or .parquet file")
    if local.is_file():
        if suffix == ".jsonl":
            return _json_lines(path)
        if suffix == ".parquet":
            return enumerate(_parquet_rows(path), 1)
        raise InputError(f"{path}: unknown kind of file {suffix!r}; expected .jsonl or .parquet")
    if suffix in (".jsonl", ".json", ".parquet") or not _HUB_NAME.fullmatch(path):
        raise InputError(f"{path}: no such file")
    return enumerate(_hub_rows(path), 1)


def _json_lines(path: str) -> Iterator[tuple[int, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}:{number}: broken JSON ({error.msg}, column {error.colno}); "
                    "expected one JSON object per line"
                ) from error
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{path}:{number}: not UTF-8 at byte {error.start} of the line"
                ) from error


def _parquet_rows(path: str) -> Iterator[dict[str, Any]]:
    import datasets  # takes a second to import, and JSON Lines never need it

    try:
        # Streaming reads the file as it is; otherwise a copy would go to the user's cache.
        yield from datasets.load_dataset("parquet", data_files=path, split="train", streaming=True)
    except Exception as error:  # the library wraps what went wrong in many types
        raise InputError(f"{path}: cannot be read as Parquet: {one_line(error)}") from error


def _hub_rows(name: str) -> Iterable[dict[str, Any]]:
    import datasets

    repository, _, split = name.partition(":")
    try:
        return datasets.load_dataset(repository, split=split or "train")
    except Exception as error:  # network, name, split: all are for the user to mend
        raise InputError(
            f"{name}: neither a local file nor a dataset that loads from the hub: {one_line(error)}"
        ) from error


def _short(value: object) -> str:
    """A value as an error message shows it: its JSON, at most 40 characters of it."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 40 else f"{text[:37]}..."
