"""How records say what there is to learn: which of the known formats, under which keys."""

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from esft_jax.data.layouts import layout
from esft_jax.errors import InputError

Format = Literal["messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text"]
# What is read of a record (of `role` and `content`: of each message), by the keys where it lies if
# nothing else is said.
COLUMNS: dict[Format, dict[str, str]] = {
    "messages": {
        "messages": "messages",
        "role": "role",
        "content": "content",
        "tools": "tools",
    },
    "sharegpt": {
        "messages": "conversations",
        "role": "from",
        "content": "value",
        "system": "system",
        "tools": "tools",
    },
    "alpaca": {
        "instruction": "instruction",
        "input": "input",
        "output": "output",
        "history": "history",
        "system": "system",
    },
    "prompt_completion": {
        "prompt": "prompt",
        "completion": "completion",
        "system": "system",
        "tools": "tools",
    },
    "question_answer": {"question": "question", "answer": "answer", "system": "system"},
    "text": {"text": "text"},
}
# What every record has.
_REQUIRED: dict[Format, tuple[str, ...]] = {
    "messages": ("messages",),
    "sharegpt": ("messages",),
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
# Keys that chats of either kind are found under.
_CHAT_KEYS = ("messages", "conversations", "conversation")
_ROLES = ("system", "user", "assistant", "tool")
# Records by which a format is recognised.
_FIRST = 8


@dataclass(frozen=True)
class RecordFormat:
    """A format, and the keys of a record where it differs from `COLUMNS`.

    Attributes:
        name: of the format.
        columns: keys by what lies there, such as `{"messages": "dialogue"}`.
    """

    name: Format
    columns: Mapping[str, str] = field(default_factory=dict)

    def key(self, column: str) -> str:
        """The key that something lies under."""
        return self.columns.get(column) or COLUMNS[self.name][column]

    @property
    def keys(self) -> list[str]:
        """Keys of a record that are read."""
        return [self.key(name) for name in COLUMNS[self.name] if name not in ("role", "content")]

    @property
    def answer_key(self) -> str:
        """The key that answers lie under."""
        return self.key(_REQUIRED[self.name][-1])

    @property
    def is_chat(self) -> bool:
        """Whether its records are chats, which a template renders; else documents."""
        return self.name != "text"

    def __str__(self) -> str:
        known = COLUMNS[self.name]
        own = [f"{name}: {key}" for name, key in self.columns.items() if key != known[name]]
        return f"{self.name} ({', '.join(own)})" if own else self.name


MESSAGES, TEXT = RecordFormat("messages"), RecordFormat("text")


def check_columns(format: Format | None, columns: Mapping[str, str]) -> str | None:
    """What is wrong with `columns`, if anything; a sentence that follows the name of that key."""
    known = COLUMNS if format is None else {format: COLUMNS[format]}
    if not any(set(columns) <= set(names) for names in known.values()):
        of = {name: ", ".join(names) for name, names in known.items()}
        expected = "; ".join(f"{names} of {name}" for name, names in of.items())
        return f"no format has {', '.join(columns)}; expected some of {expected}"
    keys = list(columns.values())
    if repeated := [key for key in keys if keys.count(key) > 1]:
        return f"{repeated[0]} is named twice; expected a key of its own for each"
    return None


def record_format(
    records: Iterable[tuple[str, dict[str, Any]]],
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    format_key: str = "data.format",
) -> RecordFormat:
    """The format of records: the one that is named, or else the only one that the first ones have.

    Args:
        records: with their places; some of the first are read, none if a format is named.
        columns: keys that differ, see `RecordFormat`.
        format_key: what messages call `format`.

    Raises:
        InputError: naming the candidates where there are several, or what the first record has.
    """
    columns = dict(columns or {})
    if format is not None and format not in get_args(Format):
        expected = ", ".join(get_args(Format))
        raise InputError(f"{format_key}: is {format!r}; expected one of {expected}")
    if wrong := check_columns(format, columns):
        raise InputError(f"{format_key.removesuffix('format')}columns: {wrong}")
    if format is not None:
        return RecordFormat(format, columns)
    first = list(itertools.islice(records, _FIRST))
    found = fitting([record for _, record in first], columns)
    if len(found) == 1:
        return found[0]
    where, record = first[0] if first else ("the data", {})
    if not found:
        names = ", ".join(get_args(Format))
        raise InputError(
            f"{where}: in none of the formats {names}; {layout(record)}; expected one of them, or "
            f"{format_key} and its columns, which name keys"
        )
    raise InputError(
        f"{where}: may be {' or '.join(map(str, found))}; expected one of them as {format_key}"
    )


def fitting(
    records: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> list[RecordFormat]:
    """The formats that all of some records have."""
    return [
        candidate
        for candidate in _candidates(dict(columns or {}))
        if all(_has(record, candidate) for record in records)
    ]


def _candidates(columns: dict[str, str]) -> Iterator[RecordFormat]:
    for name, known in COLUMNS.items():
        if not set(columns) <= set(known):
            continue
        if "messages" not in known or "messages" in columns:
            yield RecordFormat(name, columns)
        else:
            for key in _CHAT_KEYS:
                own = {} if key == known["messages"] else {"messages": key}
                yield RecordFormat(name, columns | own)


def _has(record: Mapping[str, Any], format: RecordFormat) -> bool:
    """Whether a record has what all of this format have."""
    values = [record.get(format.key(name)) for name in _REQUIRED[format.name]]
    if any(value is None for value in values):
        return False
    if "messages" not in COLUMNS[format.name]:
        return True
    (turns,) = values
    if isinstance(turns, str):  # as tables may hold it
        with contextlib.suppress(ValueError, RecursionError):
            turns = json.loads(turns)
    first = turns[0] if isinstance(turns, list) and turns else None
    if isinstance(first, dict) and (role := first.get(format.key("role"))) is not None:
        if {"role", "content"} <= set(format.columns):  # names of roles tell the two apart
            return (role in _ROLES) == (format.name == "messages")
        return True
    if isinstance(first, dict) and first.get(COLUMNS["sharegpt"]["role"]) is not None:
        return False
    # What is no chat is refused where it is read.
    return format.name == "messages" and format.key("messages") == "messages"
