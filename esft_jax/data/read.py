"""Reads chat and text examples, and says exactly where one is wrong.

A path is a local ``.jsonl`` or ``.parquet`` file, or the name of a Hugging Face dataset, as
``owner/name`` or ``owner/name:split`` (split ``train`` where none is named).
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft_jax.data.chat_template import Message
from esft_jax.data.layouts import (
    check_message_keys,
    check_record_keys,
    layout,
    role_advice,
    short,
)
from esft_jax.errors import InputError, one_line
from esft_jax.files import check_file, read_json_lines

ROLES = ("system", "user", "assistant")
MESSAGE_KEYS = ("role", "content", "mask")
# With its owner: the library takes `json` and its like for "all such files in this folder".
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.\[\]%-]+)?")
_PACKED = "expected it unpacked"
# What makes a file of another kind readable.
_OTHER_KINDS = {
    ".json": "`jq -c .[] FILE` writes an array as lines; what has a record in each line is .jsonl",
    ".ndjson": "its lines are those of .jsonl; rename it",
    ".csv": "`datasets.load_dataset('csv', data_files=FILE)['train'].to_json(NEW)` writes lines",
    ".tsv": "`datasets.load_dataset('csv', data_files=FILE, sep='\\t')['train'].to_json(NEW)` "
    "writes lines",
    ".arrow": "`datasets.Dataset.from_file(FILE).to_parquet(NEW)` writes Parquet",
    ".txt": 'write its texts as {"text": ...}, one in each line, for data.format: text',
    **dict.fromkeys((".gz", ".zst", ".bz2", ".xz", ".lz4", ".zip", ".tar", ".tgz"), _PACKED),
}


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
    """Yields ``{"messages": [{"role", "content", "mask"?}, ...]}`` records.

    Other keys of a record are free, unless they would change what is said or learned.

    Raises InputError naming file, line and key of the first record that is not one.
    """
    for where, record in read_records(paths):
        yield chat_example(where, record)


def read_text(paths: Sequence[str]) -> Iterator[TextExample]:
    """Yields ``{"text": ...}`` records; other keys are free, as for chats.

    Raises InputError naming file, line and key of the first record that is not one.
    """
    for where, record in read_records(paths):
        if record.get("text") is None:
            raise InputError(f'{where}: text: missing; expected {{"text": ...}}; {layout(record)}')
        check_record_keys(where, record, "text")
        yield TextExample(where, checked_text(where, "text", record["text"]))


def read_records(paths: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the place, ``path:line``, and the record of all lines and rows; they count from 1.

    Raises InputError naming file and line of what is no record, and files without any.
    """
    for path in paths:
        empty = True
        for where, record in _open(path):
            if not isinstance(record, dict):
                raise InputError(
                    f"{where}: is {short(record)}; expected a JSON object: one record in each line"
                )
            empty = False
            yield where, record
        if empty:
            raise InputError(f"{path}: holds no examples; expected at least one")


def checked_text(where: str, key: str, value: object) -> str:
    """A text that files can hold: JSON can also say half of a surrogate pair.

    Raises InputError naming the key.
    """
    if not isinstance(value, str):
        raise InputError(f"{where}: {key}: is {short(value)}; expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {key}: half of a surrogate pair at character {error.start}; "
            "expected valid Unicode"
        ) from error
    return value


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


def chat_example(where: str, record: dict[str, Any]) -> ChatExample:
    """The chat in a record.

    Raises InputError naming the key that is wrong.
    """
    turns = record.get("messages")
    if turns is None:
        raise InputError(
            f'{where}: messages: missing; expected a list of {{"role", "content"}}; '
            f"{layout(record)}"
        )
    if not isinstance(turns, list) or not turns:
        raise InputError(
            f'{where}: messages: is {short(turns)}; expected a list of {{"role", "content"}}'
        )
    messages = [_message(where, f"messages[{i}]", turn) for i, turn in enumerate(turns)]
    check_record_keys(where, record, "chat", [message["content"] for message in messages])
    if not any(m["role"] == "assistant" and m.get("mask", True) for m in messages):
        raise InputError(
            f"{where}: messages: no target; expected at least one assistant message "
            "without mask: false"
        )
    return ChatExample(where, messages)


def _message(where: str, key: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{where}: {key}: is {short(turn)}; expected an object")
    role = turn.get("role")
    if role is None:
        hint = "; ShareGPT's from and value are role and content" if "from" in turn else ""
        raise InputError(f"{where}: {key}.role: missing; expected a string{hint}")
    if role not in ROLES:
        raise InputError(
            f"{where}: {key}.role: is {short(role)}; expected one of {', '.join(ROLES)}"
            f"{role_advice(role)}"
        )
    check_message_keys(f"{where}: {key}", turn, MESSAGE_KEYS)
    if "content" not in turn:
        raise InputError(f"{where}: {key}.content: missing; expected a string")
    if isinstance(turn["content"], list):
        raise InputError(
            f"{where}: {key}.content: is {short(turn['content'])}; parts are not read; expected "
            "one string that holds their texts"
        )
    message = Message(role=role, content=checked_text(where, f"{key}.content", turn["content"]))
    mask = turn.get("mask")
    if mask is not None:  # Parquet has a null where the key is left out
        if mask not in (0, 1):  # True and False included
            raise InputError(f"{where}: {key}.mask: is {short(mask)}; expected true or false")
        if mask and role != "assistant":
            raise InputError(
                f"{where}: {key}.mask: is true on a {role} message; "
                "only assistant messages can be learned"
            )
        message["mask"] = bool(mask)
    if role == "assistant" and message.get("mask", True) and not message["content"].strip():
        raise InputError(
            f"{where}: {key}.content: is {short(message['content'])}; expected an answer to "
            "learn, or mask: false"
        )
    return message


def _open(path: str) -> Iterator[tuple[str, Any]]:
    """The place and the value of each line or row."""
    if _on_hub(path):
        return ((f"{path}:{number}", row) for number, row in enumerate(_hub_rows(path), 1))
    check_file(path)
    kind = Path(path).suffix.lower()
    if kind == ".jsonl":
        return read_json_lines(path)
    if kind == ".parquet":
        from esft_jax.data.arrow import parquet_rows

        return ((f"{path}:{number}", row) for number, row in enumerate(parquet_rows(path), 1))
    advice = _OTHER_KINDS.get(kind, "expected lines of JSON objects, or Parquet")
    raise InputError(
        f"{path}: unknown kind of file {kind!r}; expected .jsonl or .parquet; {advice}"
    )


def _on_hub(path: str) -> bool:
    """Whether a path names a dataset of the hub: it could, and nothing of this name is here."""
    if os.path.lexists(path) or not _HUB_NAME.fullmatch(path):
        return False
    return Path(path).suffix.lower() not in (".jsonl", ".parquet", *_OTHER_KINDS)


def _hub_rows(name: str) -> Iterator[dict[str, Any]]:
    repository, _, split = name.partition(":")
    if os.path.lexists(repository):  # the library would read it instead of the hub's
        raise InputError(
            f"{name}: {repository} is here, too; expected a local .jsonl or .parquet file, or the "
            "name of a dataset of the hub that no local file or folder has"
        )
    import datasets  # takes a second to import, and files never need it

    from esft_jax.data.arrow import BATCH_ROWS, table_rows

    try:
        dataset = datasets.load_dataset(repository, split=split or "train")
        # As it is stored: what stands for an image needs no library that opens it.
        tables = dataset.with_format("arrow").iter(BATCH_ROWS)
        yield from table_rows(tables, name)
    except InputError:
        raise
    except Exception as error:  # network, name, split: all are for the user to mend
        raise InputError(
            f"{name}: neither a local file nor a dataset that loads from the hub: {one_line(error)}"
        ) from error
