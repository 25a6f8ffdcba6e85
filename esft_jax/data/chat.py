"""Chats as records have them, and what of them a template is to show."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict

# Names of what the assistant thinks before it speaks.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")

# Stands for texts of a message, to see where a template shows them.
_PLACEHOLDER = "\ue000"


class Message(TypedDict):
    """One turn of a chat; templates see all of it but ``mask`` and ``spans``.

    ``mask`` false keeps an assistant turn out of the loss; ``spans`` limits it to characters of the
    content, from the first of a pair up to the second, and the end of the turn. ``tool_calls`` and
    one of `REASONING_KEYS` belong to the assistant, ``name`` and ``tool_call_id`` to the role
    ``tool``.
    """

    role: str
    content: str
    mask: NotRequired[bool]
    spans: NotRequired[list[tuple[int, int]]]
    tool_calls: NotRequired[list[dict[str, Any]]]
    reasoning_content: NotRequired[str]
    thinking: NotRequired[str]
    reasoning: NotRequired[str]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]


class Chat(NamedTuple):
    """Messages, and the tools that the assistant may call; None if it has none."""

    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]] | None = None

    @property
    def answers(self) -> list[int]:
        """Numbers of the assistant's messages."""
        return [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]

    def first(self, count: int) -> "Chat":
        """The chat up to a message."""
        return Chat(self.messages[:count], self.tools)


def is_learned(message: Message) -> bool:
    """Whether the loss is to cover a message."""
    return message["role"] == "assistant" and message.get("mask", True)


def reasoning(message: Mapping[str, Any]) -> dict[str, str]:
    """What was thought in a message, by its keys."""
    return {key: message[key] for key in REASONING_KEYS if message.get(key)}


def seen(message: Message) -> dict[str, Any]:
    """A message as templates see it. As in Transformers, reasoning has the names they look for."""
    hidden = ("mask", "spans")
    shown: dict[str, Any] = {key: value for key, value in message.items() if key not in hidden}
    if thoughts := list(reasoning(message).values()):
        shown = {"thinking": thoughts[0], **shown, "reasoning_content": thoughts[0]}
    return shown


def function(call: Mapping[str, Any]) -> dict[str, Any]:
    """What names a tool or a call of one: it may lie in the key `function`."""
    named: dict[str, Any] = call.get("function", call)
    return named


def replaced(message: Message) -> Message:
    """A message that says other things under the same keys."""
    texts = {key: _PLACEHOLDER for key in ("content", *reasoning(message)) if message.get(key)}
    changed: Any = {**message, **texts}
    if calls := message.get("tool_calls"):
        changed["tool_calls"] = [_with_leaves(call, lambda: _PLACEHOLDER) for call in calls]
    return changed


def marked(chat: Chat) -> tuple[Chat, list[tuple[str, tuple[str, ...]]]]:
    """A chat whose tools and their calls have marks in place of names and arguments.

    Returns:
        The chat; and for each name and each argument the key that it lies under, with the marks of
        which a rendering that shows it holds one.
    """
    marks = _Marks()
    tools = None
    if chat.tools is not None:
        tools = [marks.tool(tool, f"tools[{i}]") for i, tool in enumerate(chat.tools)]
    messages = []
    for i, message in enumerate(chat.messages):
        changed: Any = dict(message)
        if "tool_calls" in message:
            key = f"messages[{i}].tool_calls"
            calls = enumerate(message["tool_calls"])
            changed["tool_calls"] = [marks.call(call, f"{key}[{j}]") for j, call in calls]
        if "tool_call_id" in message:
            changed["tool_call_id"] = marks.of_id(message["tool_call_id"])
        messages.append(changed)
    return Chat(messages, tools), marks.wanted


class _Marks:
    """Texts that stand for others; `wanted` says which are to be found."""

    def __init__(self) -> None:
        self.wanted: list[tuple[str, tuple[str, ...]]] = []
        self._ids: dict[str, str] = {}
        self._count = 0

    def tool(self, tool: dict[str, Any], key: str) -> dict[str, Any]:
        return _with_function(tool, {**function(tool), "name": self._said(key)})

    def call(self, call: dict[str, Any], key: str) -> dict[str, Any]:
        if not isinstance(call.get("id"), str):
            return _with_leaves(call, lambda: self._said(key))
        # Some templates show the id, which holds the name, in place of the name.
        call = {**call, "id": self.of_id(call["id"])}
        return _with_leaves(call, lambda: self._said(key), lambda: self._said(key, call["id"]))

    def of_id(self, text: str) -> str:
        """One mark for all that have this id: templates look for the call of a result."""
        return self._ids.setdefault(text, self._new())

    def _said(self, key: str, *others: str) -> str:
        mark = self._new()
        self.wanted.append((key, (mark, *others)))
        return mark

    def _new(self) -> str:
        self._count += 1
        return f"zq{self._count:05}xj"  # nine letters and digits, as some templates want of ids


def _with_leaves(
    call: dict[str, Any], leaf: Callable[[], str], name: Callable[[], str] | None = None
) -> dict[str, Any]:
    """A tool call with other texts in place of its name and of all values in its arguments."""

    def change(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: change(item) for key, item in value.items()}
        if isinstance(value, list):
            return [change(item) for item in value]
        return leaf()

    called = {**function(call), "name": (name or leaf)()}
    if "arguments" in called:
        called["arguments"] = change(called["arguments"])
    return _with_function(call, called)


def _with_function(call: dict[str, Any], called: dict[str, Any]) -> dict[str, Any]:
    return {**call, "function": called} if "function" in call else called
