"""Chat templates: read from a model's folder, rendered within bounds."""

import atexit
import contextlib
import json
import os
import reprlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from esft_jax.data import template_worker
from esft_jax.data.chat import Chat, Message, marked, reasoning, seen
from esft_jax.data.samples import Cutter, Rendered, Sample, renderings
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

# Chats rendered together, and characters of all their renderings.
_BATCH_CHATS, _BATCH_CHARACTERS = 256, 4_000_000


@dataclass(frozen=True)
class ChatFormat:
    """How a run renders chats, where it differs from the model's folder.

    Attributes:
        template: Jinja source of a chat template; None takes the model's.
        arguments: what the template is given besides the chat.
        stop_token: ends an answer, and generation with it, where the template writes none.
    """

    template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    stop_token: str | None = None

    @classmethod
    def read(
        cls, template: str | None, arguments: Mapping[str, Any], stop_token: str | None
    ) -> "ChatFormat":
        """As `data.chat_template`, `data.template_arguments` and `data.stop_token` say.

        Raises:
            InputError: the file of the template is missing or empty.
        """
        if template is None:
            return cls(None, arguments, stop_token)
        source = read_text(Path(template))
        if not source.strip():
            raise InputError(f"{template}: is empty; expected a chat template")
        return cls(source, arguments, stop_token)

    def to_json(self) -> dict[str, Any]:
        """What is not as the model's folder says; `ChatFormat(**it)` is equal."""
        values = {
            "template": self.template,
            "arguments": dict(self.arguments),
            "stop_token": self.stop_token,
        }
        return {key: value for key, value in values.items() if value}


class ChatTemplate:
    """A chat template with the special tokens that it writes.

    Attributes:
        source: its Jinja source.
    """

    def __init__(
        self,
        source: str,
        variables: Mapping[str, str],
        where: str,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Takes a template; whether it compiles shows when it is first rendered.

        Args:
            source: Jinja source.
            variables: what the template sees besides the messages, whether it reads it or not.
            where: what error messages begin with.
            arguments: more of them, all of which the template has to read.
        """
        self.source = source
        self._variables, self._arguments = dict(variables), dict(arguments or {})
        self._where = where

    def render(self, chat: Chat, *, add_generation_prompt: bool = False) -> str:
        """The text of a chat. Raises an `InputError` that names the template."""
        return self._rendered(chat, add_generation_prompt).text

    def samples(self, chat: Chat) -> list[Sample]:
        """What a chat is to teach, see `Cutter.samples`.

        Raises:
            InputError: the template fails, rewrites what it should continue, or leaves out tools,
                or calls of them.
        """
        return next(self.samples_of_chats([chat]))

    def samples_of_chats(self, chats: Iterable[Chat]) -> Iterator[list[Sample]]:
        """`samples` of each chat in turn, in bulk; an error comes after the chats before it."""
        for batch in _batches(_Request(chat, renderings(chat)) for chat in chats):
            answers, fault = self._render(batch)
            for request, rendered in zip(batch, answers, strict=False):
                self._check_tools(request.chat)
                yield self._cutter(request.chat, rendered).samples()
            if fault is not None:
                raise fault

    def prompt(self, chat: Chat) -> Sample:
        """A chat with a prompt for the next answer. Raises an `InputError` as `samples` does."""
        answers, fault = self._render([_Request(chat, renderings(chat, True))])
        if fault is not None:
            raise fault
        self._check_tools(chat)
        return self._cutter(chat, answers[0]).prompt()

    def _cutter(self, chat: Chat, rendered: Sequence[Rendered]) -> Cutter:
        return Cutter(chat, rendered, self._rendered, self._where)

    def _check_tools(self, chat: Chat) -> None:
        """Refuse tools, and calls of them, that the template does not show, or not all of."""
        if not chat.tools and not any("tool_calls" in message for message in chat.messages):
            return
        changed, wanted = marked(chat)
        text = self.render(changed)
        for key, marks in wanted:
            if not any(mark in text for mark in marks):
                raise InputError(
                    f"{key}: is not, or not all of it, in what the chat template renders; "
                    "expected a template that shows it (data.chat_template), or a chat without it"
                )

    def _rendered(self, chat: Chat, add_generation_prompt: bool = False) -> Rendered:
        request = _Request(chat, [(len(chat.messages), add_generation_prompt)])
        answers, fault = self._render([request])
        if fault is not None:
            raise fault
        return answers[0][0]

    def _render(
        self, requests: Sequence["_Request"]
    ) -> tuple[list[list[Rendered]], InputError | None]:
        """The texts of chats up to the first that fails, and why it does."""
        chats = [
            {
                "messages": [seen(message) for message in chat.messages],
                "tools": chat.tools,
                "renderings": wanted,
            }
            for chat, wanted in requests
        ]
        answers: list[list[Rendered]] = []
        program = {
            "template": self.source,
            "variables": self._variables,
            "arguments": self._arguments,
        }
        try:
            for chat in _WORKER.render(program, chats):
                answers.append(chat)
        except _TemplateFault as error:
            return answers, InputError(f"{self._where}: {error}")
        return answers, None


class _Request(NamedTuple):
    """A chat, and which of its beginnings to render: messages, and whether a prompt follows."""

    chat: Chat
    renderings: list[tuple[int, bool]]


def _batches(requests: Iterable[_Request]) -> Iterator[list[_Request]]:
    """Chats to be rendered together: what is in memory is bounded."""
    batch: list[_Request] = []
    characters = 0
    for request in requests:
        batch.append(request)
        content = sum(len(text) for m in request.chat.messages for text in _texts(m))
        characters += content * len(request.renderings)
        if characters > _BATCH_CHARACTERS or len(batch) == _BATCH_CHATS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _texts(message: Message) -> Iterator[str]:
    """Those texts of a message that may be long."""
    yield message["content"]
    yield from reasoning(message).values()


class _TemplateFault(Exception):
    """A template that cannot be rendered; one line."""


class _Worker:
    """The process that renders templates, started when it is first needed.

    It is stopped after an error, since unread replies may be left.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self._stop)

    def render(
        self, program: Mapping[str, Any], chats: Sequence[Mapping[str, Any]]
    ) -> Iterator[list[Rendered]]:
        """The texts of each chat; to be read to the end, or to a `_TemplateFault`."""
        line = json.dumps({**program, "chats": chats}).encode() + b"\n"
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


def _replies(process: subprocess.Popen[bytes], line: bytes) -> Iterator[Rendered]:
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
        yield Rendered(**answer)


_WORKER = _Worker()


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
