"""Reads chats and texts from records of all formats, and says exactly where one is wrong."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from esft_jax.data.chat import REASONING_KEYS, Message, function, is_learned
from esft_jax.data.formats import COLUMNS, MESSAGES, TEXT, Format, RecordFormat
from esft_jax.data.layouts import (
    check_message_keys,
    check_record_keys,
    layout,
    role_advice,
    says_nothing,
    short,
)
from esft_jax.data.records import read_records
from esft_jax.errors import InputError, one_line
from esft_jax.files import parse_json
from esft_jax.progress import Advance

# Keys of messages by role, besides `role`, `content` and `mask`.
ROLES = {
    "system": (),
    "user": (),
    "assistant": ("tool_calls", *REASONING_KEYS),
    "tool": ("name", "tool_call_id"),
}
# Names of what says whether a message is learned: ours, Axolotl's two, OpenAI's, ms-swift's; and of
# what says it of characters, Axolotl's.
MASKS = ("mask", "train", "training", "weight", "loss")
SPANS = "train_detail"
_SPAN_KEYS = ("begin_offset", "end_offset", "train")
# Roles as ShareGPT, and the tools that read its format, name them.
SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "assistant"), "assistant"),
    "system": "system",
    **dict.fromkeys(("observation", "tool", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
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


def read_chat(
    paths: Sequence[str], format: RecordFormat = MESSAGES, advance: Advance | None = None
) -> Iterator[ChatExample]:
    """Yields the chats in records of a format; `{"messages": ...}` have messages as in `ROLES`.

    Other keys of a record are free, unless they would change what is said or learned.

    Raises InputError naming file, line and key of the first record that is not one.
    """
    for where, record in read_records(paths, advance):
        yield chat_example(where, record, format)


def read_text(
    paths: Sequence[str], format: RecordFormat = TEXT, advance: Advance | None = None
) -> Iterator[TextExample]:
    """Yields ``{"text": ...}`` records; other keys are free, as for chats.

    Raises InputError naming file, line and key of the first record that is not one.
    """
    key = format.key("text")
    for where, record in read_records(paths, advance):
        if record.get(key) is None:
            raise InputError(
                f'{where}: {key}: missing; expected {{"{key}": ...}}; {layout(record)}'
            )
        check_record_keys(where, record, "text")
        yield TextExample(where, checked_text(where, key, record[key]))


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


def chat_example(
    where: str, record: dict[str, Any], format: RecordFormat = MESSAGES
) -> ChatExample:
    """The chat in a record of a format.

    Raises InputError naming the key that is wrong.
    """
    messages = list(_MESSAGES[format.name](_Record(where, record, format)))
    said = [message["content"] for message in messages]
    check_record_keys(where, record, "chat", said, read=format.keys)
    if not any(map(is_learned, messages)):
        raise InputError(
            f"{where}: {format.answer_key}: no target; expected at least one assistant message "
            "without mask: false"
        )
    has_tools = "tools" in COLUMNS[format.name]
    tools = _tools(where, format.key("tools"), record) if has_tools else None
    return ChatExample(where, messages, tools)


class _Record(NamedTuple):
    """A record of a format, and its place."""

    where: str
    record: dict[str, Any]
    format: RecordFormat

    def get(self, column: str) -> Any:
        """What lies there; None if that is as good as nothing."""
        value = self.record.get(self.format.key(column))
        return None if says_nothing(value) else value

    def text(self, column: str) -> str:
        """A text that has to be there."""
        key = self.format.key(column)
        if self.record.get(key) is None:
            raise InputError(
                f"{self.where}: {key}: missing; expected a text; {layout(self.record)}"
            )
        return checked_text(self.where, key, self.record[key])

    def answer(self, column: str) -> Message:
        """An answer that is to be learned."""
        return _answer(self.where, self.format.key(column), self.text(column))

    def turns(self, column: str) -> list[Message]:
        """A list of messages, which tables may hold as the text of its JSON."""
        where, key, format = self.where, self.format.key(column), self.format
        role, content = (
            (format.key("role"), format.key("content"))
            if "role" in COLUMNS[format.name]
            else ("role", "content")
        )
        turns = self.record.get(key)
        if turns is None:
            raise InputError(
                f'{where}: {key}: missing; expected a list of {{"{role}", "{content}"}}; '
                f"{layout(self.record)}"
            )
        found = parse_json(turns, f"{where}: {key}") if isinstance(turns, str) else turns
        if not isinstance(found, list) or not found:
            raise InputError(
                f'{where}: {key}: is {short(turns)}; expected a list of {{"{role}", "{content}"}}'
            )
        read = _sharegpt_message if format.name == "sharegpt" else _message
        return [read(where, f"{key}[{i}]", turn, role, content) for i, turn in enumerate(found)]

    def system(self, messages: Sequence[Message] = ()) -> Iterator[Message]:
        """The message of a system text that lies beside others, unless the first one says it."""
        text = self.get("system")
        if text is None:
            return
        key = self.format.key("system")
        message = Message(role="system", content=checked_text(self.where, key, text))
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"].strip() != text.strip():
                raise InputError(
                    f"{self.where}: {key}: is {short(text)} beside a message of the system that "
                    "says another text; expected one of them"
                )
            return
        yield message


def _answer(where: str, key: str, text: str) -> Message:
    """An answer that is to be learned."""
    if not text.strip():
        raise InputError(f"{where}: {key}: is {short(text)}; expected an answer to learn")
    return Message(role="assistant", content=text)


def _chat_messages(record: _Record) -> Iterator[Message]:
    yield from record.turns("messages")


def _sharegpt_messages(record: _Record) -> Iterator[Message]:
    messages = record.turns("messages")
    yield from record.system(messages)
    yield from messages


def _alpaca_messages(record: _Record) -> Iterator[Message]:
    yield from record.system()
    key, history = record.format.key("history"), record.get("history") or []
    if isinstance(history, str):
        history = parse_json(history, f"{record.where}: {key}")
    for i, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2:
            raise InputError(
                f"{record.where}: {key}[{i}]: is {short(pair)}; expected [instruction, output]"
            )
        asked, answer = (checked_text(record.where, f"{key}[{i}]", text) for text in pair)
        yield Message(role="user", content=asked)
        yield _answer(record.where, f"{key}[{i}]", answer)
    asked = record.text("instruction")
    if not _absent(record.record.get(record.format.key("input"))):
        asked = f"{asked}\n{record.text('input')}"
    yield Message(role="user", content=asked)
    yield record.answer("output")


def _prompt_completion_messages(record: _Record) -> Iterator[Message]:
    """A text each, or messages each, of which those of the completion alone are learned."""
    if isinstance(record.get("prompt"), list):
        prompt = record.turns("prompt")
        yield from record.system(prompt)
        for message in prompt:
            yield {**message, "mask": False} if message["role"] == "assistant" else message
        yield from record.turns("completion")
    else:
        yield from record.system()
        yield Message(role="user", content=record.text("prompt"))
        yield record.answer("completion")


def _question_answer_messages(record: _Record) -> Iterator[Message]:
    yield from record.system()
    yield Message(role="user", content=record.text("question"))
    yield record.answer("answer")


_MESSAGES: dict[Format, Callable[[_Record], Iterator[Message]]] = {
    "messages": _chat_messages,
    "sharegpt": _sharegpt_messages,
    "alpaca": _alpaca_messages,
    "prompt_completion": _prompt_completion_messages,
    "question_answer": _question_answer_messages,
}


def _sharegpt_message(
    where: str, key: str, turn: object, role_key: str, content_key: str
) -> Message:
    """A message whose role has another name, or which is a call of a tool in JSON."""
    role = turn.get(role_key) if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or role is None:
        return _message(where, key, turn, role_key, content_key)
    name = role.lower() if isinstance(role, str) else ""
    if name not in SHAREGPT_ROLES:
        raise InputError(
            f"{where}: {key}.{role_key}: is {short(role)}; expected one of "
            f"{', '.join(SHAREGPT_ROLES)}"
        )
    turn = {**turn, role_key: SHAREGPT_ROLES[name]}
    if name in ("function_call", "tool_call"):
        place = f"{key}.{content_key}"
        text = checked_text(where, place, turn.pop(content_key, None))
        calls = parse_json(text, f"{where}: {place}")
        turn["tool_calls"] = [
            {"type": "function", "function": call} if isinstance(call, dict) else call
            for call in (calls if isinstance(calls, list) else [calls])
        ]
    return _message(where, key, turn, role_key, content_key)


def _message(
    where: str, key: str, turn: object, role_key: str = "role", content_key: str = "content"
) -> Message:
    if not isinstance(turn, dict):
        raise InputError(f"{where}: {key}: is {short(turn)}; expected an object")
    role = turn.get(role_key)
    if role is None:
        hint = "; ShareGPT's from and value are data.format: sharegpt" if "from" in turn else ""
        raise InputError(f"{where}: {key}.{role_key}: missing; expected a string{hint}")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(
            f"{where}: {key}.{role_key}: is {short(role)}; expected one of {', '.join(ROLES)}"
            f"{role_advice(role)}"
        )
    mask = _mask(where, key, role, turn)
    others = (SPANS,) if role == "assistant" else ()
    check_message_keys(
        f"{where}: {key}", turn, (role_key, content_key, *MASKS, *others, *ROLES[role])
    )
    extras: dict[str, Any] = {
        name: checked_text(where, f"{key}.{name}", turn[name])
        for name in ROLES[role]
        if name != "tool_calls" and not _absent(turn.get(name))
    }
    if not says_nothing(turn.get("tool_calls")):
        extras["tool_calls"] = _calls(where, f"{key}.tool_calls", turn["tool_calls"])
    content = turn.get(content_key)
    if content is None and "tool_calls" in extras:
        content = ""
    if content is None and content_key not in turn:
        raise InputError(f"{where}: {key}.{content_key}: missing; expected a string")
    if isinstance(content, list):
        raise InputError(
            f"{where}: {key}.{content_key}: is {short(content)}; parts are not read; expected "
            "one string that holds their texts"
        )
    message = Message(role=role, content=checked_text(where, f"{key}.{content_key}", content))
    # Keys and values were checked when `extras` was made.
    message.update(extras)  # type: ignore[typeddict-item]
    if mask is not False and not says_nothing(turn.get(SPANS)):
        spans = _spans(where, f"{key}.{SPANS}", turn[SPANS], message["content"])
        if spans:
            message["spans"] = spans
        else:
            mask = False
    if mask is not None:
        message["mask"] = mask
    if is_learned(message) and not message["content"].strip() and "tool_calls" not in message:
        raise InputError(
            f"{where}: {key}.{content_key}: is {short(message['content'])}; expected an answer to "
            "learn, or mask: false"
        )
    return message


def _mask(where: str, key: str, role: str, turn: dict[str, Any]) -> bool | None:
    """Whether a message is to be learned; None if nothing says it."""
    said: dict[str, bool] = {}
    for name in MASKS:
        value = turn.get(name)
        if value is None:  # Parquet has a null where the key is left out
            continue
        if value not in (0, 1):  # True and False included
            raise InputError(f"{where}: {key}.{name}: is {short(value)}; expected true or false")
        if value and role != "assistant":
            raise InputError(
                f"{where}: {key}.{name}: is {short(value)} on a {role} message; only assistant "
                "messages can be learned"
            )
        said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise InputError(
            f"{where}: {key}: {' and '.join(said)} say different things; expected one of them"
        )
    return next(iter(said.values()), None)


def _spans(where: str, key: str, value: object, content: str) -> list[tuple[int, int]]:
    """Characters of a message that are to be learned, as Axolotl's records say it."""
    spans: list[tuple[int, int]] = []
    for i, span in enumerate(_objects(where, key, value, "spans")):
        begin, end, train = (span.get(name) for name in _SPAN_KEYS)
        numbers = [n for n in (begin, end) if isinstance(n, int) and not isinstance(n, bool)]
        if (
            len(numbers) < 2
            or not 0 <= numbers[0] <= numbers[1] < len(content)
            or train not in (0, 1)
            or not set(span) <= set(_SPAN_KEYS)
        ):
            raise InputError(
                f"{where}: {key}[{i}]: is {short(span)}; expected begin_offset and end_offset, the "
                f"first and the last of some of the message's {len(content)} characters, counted "
                "from 0, and train: true or false"
            )
        if train:
            spans.append((numbers[0], numbers[1] + 1))
    return spans


def _absent(value: object) -> bool:
    return value is None or value == ""


def _tools(where: str, key: str, record: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The functions that a chat offers, as OpenAI and Transformers describe them."""
    if says_nothing(record.get(key)):
        return None
    tools = _objects(where, key, record[key], "tools")
    for i in range(len(tools)):
        _check_name(where, key, tools, i)
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
