"""Chat templates: read from a model's folder, rendered within bounds, cut at answers."""

import atexit
import bisect
import contextlib
import itertools
import json
import os
import reprlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, NotRequired, TypedDict

from esft_jax.data import template_worker
from esft_jax.errors import InputError
from esft_jax.files import checked, read_json, read_text

# The format ESFT trains on: BOS, "User: {x}\n\nAssistant:", " {y}", EOS.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}User: {{ m.content }}{{ '\\n\\n' }}"
    "{% else %}{{ m.content }}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Where the default template lies, besides `tokenizer_config.json`.
TEMPLATE_FILE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"

# Characters of a text that messages show.
_SHOWN = 40
# Chats rendered together, and characters of all their renderings.
_BATCH_CHATS, _BATCH_CHARACTERS = 256, 4_000_000


class Message(TypedDict):
    """One turn of a chat; ``mask`` false keeps an assistant turn out of the loss."""

    role: str
    content: str
    mask: NotRequired[bool]


class Piece(NamedTuple):
    """A part of a rendered chat.

    Attributes:
        text: the part, not empty.
        turn: number of the message that it is to teach; None if it is not to be learned.
    """

    text: str
    turn: int | None


class ChatTemplate:
    """A chat template with the special tokens that it writes.

    Attributes:
        source: its Jinja source.
    """

    def __init__(self, source: str, variables: Mapping[str, str], where: str) -> None:
        """Takes a template; whether it compiles shows when it is first rendered.

        Args:
            source: Jinja source.
            variables: what the template sees besides the messages.
            where: what error messages begin with.
        """
        self.source = source
        self._variables, self._where = dict(variables), where

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a chat. Raises an `InputError` that names the template."""
        request = _Request(messages, [(len(messages), add_generation_prompt)])
        answers, fault = self._render([request])
        if fault is not None:
            raise fault
        return answers[0][0].text

    def pieces(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> list[Piece]:
        """The rendered chat cut where the assistant begins and ends.

        To be learned is what the template adds for an assistant's message to the prompt that was
        before it, or the part of the text within the template's generation blocks if it has any.
        Not if the message has ``mask`` false.

        Each piece is to be encoded on its own: a merge across a cut would give the prompt other
        tokens in training than in generation.

        Raises:
            InputError: the template fails, or its texts do not continue each other.
        """
        renderings = _renderings(messages, add_generation_prompt)
        answers, fault = self._render([_Request(messages, renderings)])
        if fault is not None:
            raise fault
        return self._cut(messages, answers[0])

    def pieces_of_chats(self, chats: Iterable[Sequence[Message]]) -> Iterator[list[Piece]]:
        """`pieces` of each chat in turn, in bulk; an error comes after the chats before it."""
        for batch in _batches(_Request(messages, _renderings(messages)) for messages in chats):
            answers, fault = self._render(batch)
            for request, rendered in zip(batch, answers, strict=False):
                yield self._cut(request.messages, rendered)
            if fault is not None:
                raise fault

    def _cut(self, messages: Sequence[Message], rendered: Sequence["_Rendered"]) -> list[Piece]:
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = rendered[-1].spans
        # Where each region of the text ends, and the message that it belongs to.
        ends: list[int] = []
        owners: list[int | None] = []
        before = ""
        for i, prompt, answer in zip(turns, rendered[0::2], rendered[1::2], strict=False):
            self._check_continues(before, prompt.text)
            if not answer.text.startswith(prompt.text):
                self._explain(messages, i, prompt.text, answer.text)
            learned = i if messages[i].get("mask", True) else None
            ends += [len(prompt.text), len(answer.text)]
            owners += [None if spans is None else learned, learned]
            before = answer.text
        text = rendered[-1].text
        self._check_continues(before, text)
        bounds = [] if spans is None else [bound for span in spans for bound in span]
        pieces = []
        for begin, end in itertools.pairwise(sorted({0, *ends, *bounds, len(text)})):
            region = bisect.bisect_right(ends, begin)
            owner = owners[region] if region < len(owners) else None
            if spans is not None and bisect.bisect_right(bounds, begin) % 2 == 0:
                owner = None  # between two generation blocks
            pieces.append(Piece(text[begin:end], owner))
        return pieces

    def _check_continues(self, before: str, text: str) -> None:
        if not text.startswith(before):
            raise InputError(
                f"{self._where}: rewrites earlier messages when later ones follow; expected each "
                "message to only add text"
            )

    def _explain(self, messages: Sequence[Message], i: int, prompt: str, answer: str) -> NoReturn:
        """Says why the text with an answer does not continue the prompt for it."""
        self._check_continues(self.render(messages[:i]), answer)
        common = common_length(prompt, answer)
        raise InputError(
            f"{self._where}: the generation prompt is not what precedes the answer when that is "
            f"rendered: for messages[{i}] it ends in {prompt[-_SHOWN:]!r}; in place of its last "
            f"{len(prompt) - common} characters the chat has {answer[common:][:_SHOWN]!r}"
        )

    def _render(
        self, requests: Sequence["_Request"]
    ) -> tuple[list[list["_Rendered"]], InputError | None]:
        """The texts of chats up to the first that fails, and why it does."""
        chats = [
            {
                "messages": [{"role": m["role"], "content": m["content"]} for m in messages],
                "renderings": renderings,
            }
            for messages, renderings in requests
        ]
        answers: list[list[_Rendered]] = []
        try:
            for chat in _WORKER.render(self.source, self._variables, chats):
                answers.append(chat)
        except _TemplateFault as error:
            return answers, InputError(f"{self._where}: {error}")
        return answers, None


class _Request(NamedTuple):
    """A chat, and which of its beginnings to render: messages, and whether a prompt follows."""

    messages: Sequence[Message]
    renderings: list[tuple[int, bool]]


def _renderings(
    messages: Sequence[Message], add_generation_prompt: bool = False
) -> list[tuple[int, bool]]:
    """Before and after each of the assistant's messages, and the whole chat at the end."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    renderings = [item for i in turns for item in ((i, True), (i + 1, False))]
    whole = (len(messages), add_generation_prompt)
    return renderings if renderings[-1:] == [whole] else [*renderings, whole]


def _batches(requests: Iterable[_Request]) -> Iterator[list[_Request]]:
    """Chats to be rendered together: what is in memory is bounded."""
    batch: list[_Request] = []
    characters = 0
    for request in requests:
        batch.append(request)
        content = sum(len(message["content"]) for message in request.messages)
        characters += content * len(request.renderings)
        if characters > _BATCH_CHARACTERS or len(batch) == _BATCH_CHATS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Rendered(NamedTuple):
    """A text, and the ranges of it that generation blocks made; None without such blocks."""

    text: str
    spans: list[tuple[int, int]] | None


class _TemplateFault(Exception):
    """A template that cannot be rendered; one line."""


class _Worker:
    """The process that renders templates, started when it is first needed.

    It is stopped after an error, since replies may be left that nobody reads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self._stop)

    def render(
        self, template: str, variables: Mapping[str, str], chats: Sequence[Mapping[str, Any]]
    ) -> Iterator[list[_Rendered]]:
        """The texts of each chat; to be read to the end, or to a `_TemplateFault`."""
        request = {"template": template, "variables": variables, "chats": chats}
        line = json.dumps(request).encode() + b"\n"
        with self._lock:
            try:
                replies = _replies(self._started(), line)
                for chat in chats:
                    yield [next(replies) for _ in chat["renderings"]]
            except BaseException:  # an interrupt, too
                self._stop()
                raise

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            # -P: the modules beside the file are not to be found in place of others.
            command = [sys.executable, "-P", template_worker.__file__]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                )
            except OSError as error:
                raise _TemplateFault(f"no process to render it: {error.strerror}") from None
        return self._process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError), self._process:
                self._process = None


def _replies(process: subprocess.Popen[bytes], line: bytes) -> Iterator[_Rendered]:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # how the process ended is said below
        process.stdin.write(line)
        process.stdin.flush()
    while True:
        reply = process.stdout.readline()
        if not reply.endswith(b"\n"):
            code = process.wait()
            if code == -signal.SIGPROF:
                raise _TemplateFault(
                    f"takes too long; expected at most {template_worker.SECONDS:g} s for a chat, "
                    f"and {template_worker.MEAN_SECONDS:g} s on average"
                )
            raise _TemplateFault(f"ends the process that renders it, with code {code}")
        answer = json.loads(reply)
        if "error" in answer:
            raise _TemplateFault(answer["error"])
        yield _Rendered(**answer)


_WORKER = _Worker()


def common_length(one: str, other: str) -> int:
    """Characters at the beginning of two texts that are the same."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in same)


def named_templates(folder: Path) -> list[Path]:
    """Files of a Hugging Face folder with chat templates besides the default one."""
    return sorted((folder / "additional_chat_templates").glob("[!.]*.jinja"))


def read_template(folder: Path, config: Mapping[str, Any], config_path: Path) -> tuple[str, str]:
    """The default chat template of a Hugging Face folder: its source, and where it was found.

    As in Transformers, template files go before the key `chat_template` of `tokenizer_config.json`;
    `chat_template.json`, in which processors have it, comes last. DeepSeek's format where there is
    none.

    Raises:
        InputError: there are only templates of other names, or one that is no text.
    """
    named = {path.stem: (read_text(path), str(path)) for path in named_templates(folder)}
    # A link that leads nowhere is there, and broken.
    if os.path.lexists(folder / TEMPLATE_FILE):
        named["default"] = read_text(folder / TEMPLATE_FILE), str(folder / TEMPLATE_FILE)
    if not named:
        named = _named(config.get("chat_template"), f"{config_path}: chat_template")
    if not named and os.path.lexists(folder / TEMPLATE_JSON):
        path = folder / TEMPLATE_JSON
        value = read_json(path)
        if not isinstance(value, dict) or "chat_template" not in value:
            raise InputError(f'{path}: expected an object {{"chat_template"}}')
        named = _named(value["chat_template"], f"{path}: chat_template")
    if not named:
        return DEFAULT_TEMPLATE, "chat template"
    if "default" not in named:
        names = ", ".join(sorted(named))
        raise InputError(
            f"{folder}: chat templates: found {names} only; expected one named default"
        )
    source, where = named["default"]
    if not source.strip():
        raise InputError(f"{where}: is empty; expected a chat template")
    return source, f"{where}: chat template"


def _named(value: object, where: str) -> dict[str, tuple[str, str]]:
    """Templates by name, with their places, in one of the ways that JSON files spell them."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": (value, where)}
    if isinstance(value, dict):
        entries = [(name, text, f"{where}.{name}") for name, text in value.items()]
    elif isinstance(value, list):
        entries = []
        for number, entry in enumerate(value):
            place = f"{where}[{number}]"
            if not isinstance(entry, dict):
                raise InputError(f"{place}: is {reprlib.repr(entry)}; expected name and template")
            name = checked(str, entry.get("name"), f"{place}.name")
            entries.append((name, entry.get("template"), f"{place}.template"))
    else:
        raise InputError(f"{where}: is {reprlib.repr(value)}; expected a text or named texts")
    named = {name: (checked(str, text, place), place) for name, text, place in entries}
    if len(named) < len(entries):
        raise InputError(f"{where}: two templates have one name; expected names to differ")
    return named
