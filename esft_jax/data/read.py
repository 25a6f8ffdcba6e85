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

from esft_jax.data.chat import REASONING_KEYS, Message, function, is_learned
from esft_jax.data.layouts import (
    check_message_keys,
    check_record_keys,
    layout,
    role_advice,
    says_nothing,
    short,
)
from esft_jax.errors import InputError, one_line
from esft_jax.files import check_file, parse_json, read_json_lines

# Keys of messages by role, besides `role`, `content` and `mask`.
ROLES = {
    "system": (),
    "user": (),
    "assistant": ("tool_calls", *REASONING_KEYS),
    "tool": ("name", "tool_call_id"),
}
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
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class TextExample:
    """A document, and the place it came from."""

    where: str
    text: str


def read_chat(paths: Sequence[str]) -> Iterator[ChatExample]:
    """Yields ``{"messages": [{"role", "content", ...}, ...], "tools"?}`` records, see `ROLES`.

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
    said = [message["content"] for message in messages]
    check_record_keys(where, record, "chat", said, read=("tools",))
    if not any(map(is_learned, messages)):
        raise InputError(
            f"{where}: messages: no target; expected at least one assistant message "
            "without mask: false"
        )
    return ChatExample(where, messages, _tools(where, record.get("tools")))


def _message(where: str, key: str, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{where}: {key}: is {short(turn)}; expected an object")
    role = turn.get("role")
    if role is None:
        hint = "; ShareGPT's from and value are role and content" if "from" in turn else ""
        raise InputError(f"{where}: {key}.role: missing; expected a string{hint}")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(
            f"{where}: {key}.role: is {short(role)}; expected one of {', '.join(ROLES)}"
            f"{role_advice(role)}"
        )
    mask = _mask(where, f"{key}.mask", role, turn.get("mask"))
    check_message_keys(f"{where}: {key}", turn, ("role", "content", "mask", *ROLES[role]))
    extras: dict[str, Any] = {
        name: checked_text(where, f"{key}.{name}", turn[name])
        for name in ROLES[role]
        if name != "tool_calls" and not _absent(turn.get(name))
    }
    if not says_nothing(turn.get("tool_calls")):
        extras["tool_calls"] = _calls(where, f"{key}.tool_calls", turn["tool_calls"])
    content = turn.get("content")
    if content is None and "tool_calls" in extras:
        content = ""
    if content is None and "content" not in turn:
        raise InputError(f"{where}: {key}.content: missing; expected a string")
    if isinstance(content, list):
        raise InputError(
            f"{where}: {key}.content: is {short(content)}; parts are not read; expected "
            "one string that holds their texts"
        )
    message = Message(role=role, content=checked_text(where, f"{key}.content", content))
    # Keys and values were checked when `extras` was made.
    message.update(extras)  # type: ignore[typeddict-item]
    if mask is not None:
        message["mask"] = mask
    if is_learned(message) and not message["content"].strip() and "tool_calls" not in message:
        raise InputError(
            f"{where}: {key}.content: is {short(message['content'])}; expected an answer to "
            "learn, or mask: false"
        )
    return message


def _mask(where: str, key: str, role: str, mask: object) -> bool | None:
    if mask is None:  # Parquet has a null where the key is left out
        return None
    if mask not in (0, 1):  # True and False included
        raise InputError(f"{where}: {key}: is {short(mask)}; expected true or false")
    if mask and role != "assistant":
        raise InputError(
            f"{where}: {key}: is true on a {role} message; only assistant messages can be learned"
        )
    return bool(mask)


def _absent(value: object) -> bool:
    return value is None or value == ""


def _tools(where: str, value: object) -> list[dict[str, Any]] | None:
    """The functions that a chat offers, as OpenAI and Transformers describe them."""
    if says_nothing(value):
        return None
    tools = _objects(where, "tools", value, "tools")
    for i in range(len(tools)):
        _check_name(where, "tools", tools, i)
    return tools


def _calls(where: str, key: str, value: object) -> list[dict[str, Any]]:
    calls = _objects(where, key, value, "calls of tools")
    for i in range(len(calls)):
        named, place = _check_name(where, key, calls, i)
        arguments = named.get("arguments", {})
        if not isinstance(arguments, dict | str):
            raise InputError(
                f"{where}: {place}.arguments: is {short(arguments)}; expected an object, or a "
                "string that holds its JSON"
            )
    return calls


def _objects(where: str, key: str, value: object, what: str) -> list[dict[str, Any]]:
    """A list of objects, which tables may hold as the text of its JSON."""
    found = parse_json(value, f"{where}: {key}") if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        raise InputError(f"{where}: {key}: is {short(value)}; expected a list of {what}: objects")
    try:
        text = json.dumps(found, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:  # a time from a table, or NaN
        raise InputError(f"{where}: {key}: is no JSON: {one_line(error)}") from error
    checked_text(where, key, text)
    return found


def _check_name(
    where: str, key: str, tools: Sequence[dict[str, Any]], i: int
) -> tuple[dict[str, Any], str]:
    """The object that names a tool, or the call of one, with its key."""
    named, place = function(tools[i]), f"{key}[{i}]{'.function' * ('function' in tools[i])}"
    name = named.get("name") if isinstance(named, dict) else None
    if not isinstance(name, str) or not name.strip():
        raise InputError(
            f"{where}: {key}: is {short(tools)}; {place}.name: "
            + ("missing" if name is None else f"is {short(name)}")
            + '; expected {"type": "function", "function": {"name": ..., ...}}'
        )
    return named, place


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
