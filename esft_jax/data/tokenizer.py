"""A Hugging Face tokenizer folder: text to ids and back, and chats rendered by its template."""

import datetime
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, NotRequired, TypedDict

import jinja2
import jinja2.ext
import jinja2.sandbox
import tokenizers

from esft_jax.errors import InputError, one_line
from esft_jax.files import parse_json

# The format ESFT trains on: BOS, "User: {x}\n\nAssistant:", " {y}", EOS.
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'assistant' %}Assistant: {{ m.content }}{{ eos_token }}"
    "{% elif m.role == 'user' %}User: {{ m.content }}{{ '\\n\\n' }}"
    "{% else %}{{ m.content }}{{ '\\n\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
# What `Tokenizer.load` reads.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

# Text handed to the library at once: bounds the memory its encodings take.
_BATCH_CHARACTERS = 4_000_000


class Message(TypedDict):
    """One turn of a chat; ``mask`` false keeps an assistant turn out of the loss."""

    role: str
    content: str
    mask: NotRequired[bool]


class Tokenizer:
    """Tokenizer with its special tokens and chat template.

    Attributes:
        bos_id: first token of a document, or None if the tokenizer has none.
        eos_id: last token of a document or an answer.
        pad_id: token of unused positions; EOS where the tokenizer names none.
        begins_with_bos: whether the tokenizer puts BOS before plain text by itself. `encode` never
            does.
        chat_template: source of the chat template.
        vocab_size: one more than the highest id.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_token: str | None,
        eos_token: str,
        pad_token: str | None = None,
        add_bos_token: bool | None = None,
        chat_template: str | None = None,
    ) -> None:
        """Wraps a loaded tokenizer; raises InputError on a special token it does not know."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.bos_id = None if bos_token is None else self._special_id("bos_token", bos_token)
        self.eos_id = self._special_id("eos_token", eos_token)
        self.pad_id = self.eos_id if pad_token is None else self._special_id("pad_token", pad_token)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        if add_bos_token is None:
            special = backend.encode("", add_special_tokens=True).ids
            add_bos_token = special[:1] == [self.bos_id]
        self.begins_with_bos = add_bos_token and self.bos_id is not None
        self.chat_template = DEFAULT_TEMPLATE if chat_template is None else chat_template
        self._template = _compile(self.chat_template)
        self._specials = {"bos_token": bos_token or "", "eos_token": eos_token}
        if pad_token is not None:
            self._specials["pad_token"] = pad_token

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads ``tokenizer.json`` and ``tokenizer_config.json`` of a Hugging Face folder.

        The chat template is ``chat_template.jinja``, else the one in the configuration, else
        DeepSeek's. Raises InputError that names the file and the key.
        """
        tokenizer_path, config_path, template_path = (Path(folder) / n for n in TOKENIZER_FILES)
        config = parse_json(_read(config_path), str(config_path))
        if not isinstance(config, dict):
            raise InputError(f"{config_path}: expected a JSON object")
        eos_token = _token_text(config, "eos_token")
        if eos_token is None:
            raise InputError(f"{config_path}: eos_token: missing; expected the token ending a text")
        definition = _read(tokenizer_path)
        try:
            backend = tokenizers.Tokenizer.from_str(definition)
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{tokenizer_path}: not a tokenizer: {one_line(error)}") from error
        template = _read(template_path) if template_path.exists() else config.get("chat_template")
        if isinstance(template, list):  # several named templates
            template = {t["name"]: t["template"] for t in template}.get("default")
        try:
            return cls(
                backend,
                bos_token=_token_text(config, "bos_token"),
                eos_token=eos_token,
                pad_token=_token_text(config, "pad_token"),
                add_bos_token=config.get("add_bos_token"),
                chat_template=template,
            )
        except InputError as error:
            raise InputError(f"{folder}: {error}") from error

    def check_vocabulary(self, size: int) -> None:
        """Raise an `InputError` if a model with this many embeddings lacks one for some token."""
        if self.vocab_size > size:
            raise InputError(
                f"tokenizer.json: token ids up to {self.vocab_size - 1}; the model's vocab_size is "
                f"{size}"
            )

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no special token is added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """``encode`` of each text in turn, in bulk: several times as fast."""
        start = 0
        while start < len(texts):
            stop, characters = start, 0
            while stop < len(texts) and characters < _BATCH_CHARACTERS:
                characters += len(texts[stop])
                stop += 1
            batch = list(texts[start:stop])
            for encoding in self._backend.encode_batch_fast(batch, add_special_tokens=False):
                yield encoding.ids
            start = stop

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat, and which of them are to be learned.

        Learned are the assistant's words and what the template ends them with (EOS), unless the
        message has ``mask`` false; never the first token.
        """
        pieces = self.chat_pieces(messages)
        encoded = self.encode_batch([text for text, _ in pieces])
        tokens: list[int] = []
        learn: list[bool] = []
        for ids, (_, learned) in zip(encoded, pieces, strict=True):
            tokens += ids
            learn += [learned] * len(ids)
        return tokens, [False, *learn[1:]]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids after which the assistant speaks; a prefix of the ``encode_chat`` ids."""
        pieces = self.chat_pieces(messages, add_generation_prompt=True)
        encoded = self.encode_batch([text for text, _ in pieces])
        return [token for ids in encoded for token in ids]

    def chat_pieces(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> list[tuple[str, bool]]:
        """The rendered chat cut where the assistant begins and ends, and which cuts to learn.

        Each piece is encoded on its own: a merge across a cut would give the prompt other tokens
        in training than in generation.
        """
        pieces: list[tuple[str, bool]] = []
        rendered = ""

        def extend(text: str, learned: bool) -> None:
            nonlocal rendered
            if not text.startswith(rendered):
                raise InputError(
                    "chat template: rewrites earlier messages when later ones follow; "
                    "expected each message to only add text"
                )
            if text != rendered:
                pieces.append((text[len(rendered) :], learned))
            rendered = text

        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                extend(self.render(messages[:i], add_generation_prompt=True), False)
                extend(self.render(messages[: i + 1]), bool(message.get("mask", True)))
        extend(self.render(messages, add_generation_prompt=add_generation_prompt), False)
        return pieces

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a chat, by the template."""
        turns = [{"role": m["role"], "content": m["content"]} for m in messages]
        try:
            return self._template.render(
                messages=turns, add_generation_prompt=add_generation_prompt, **self._specials
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise InputError(f"chat template: {one_line(error)}") from error

    def _special_id(self, key: str, token: str) -> int:
        token_id = self._backend.token_to_id(token)
        if token_id is None:
            raise InputError(f"{key}: {token!r} is not in the vocabulary of tokenizer.json")
        return token_id


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path}: cannot be read ({one_line(error)}); expected a Hugging Face tokenizer file"
        ) from error


def _token_text(config: dict[str, Any], key: str) -> str | None:
    """A special token of the configuration: plain text, or an object with its ``content``."""
    token = config.get(key)
    return token["content"] if isinstance(token, dict) else token


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _compile(template: str) -> jinja2.Template:
    """Compiles with the settings and helpers that Hugging Face templates count on."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(
        value, ensure_ascii=False, **options
    )
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise InputError(f"chat template: {one_line(error)}") from error
