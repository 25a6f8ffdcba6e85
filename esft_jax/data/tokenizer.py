"""A Hugging Face tokenizer folder: text to ids and back, chats as its template renders them."""

import contextlib
import functools
import os
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import tokenizers

from esft_jax.data.chat_template import (
    DEFAULT_TEMPLATE,
    TEMPLATE_FILE,
    TEMPLATE_JSON,
    ChatTemplate,
    Message,
    Piece,
    common_length,
    read_template,
)
from esft_jax.errors import InputError, one_line
from esft_jax.files import checked, read_json, read_text

# What `Tokenizer.load` reads, besides named chat templates.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    TEMPLATE_FILE,
    TEMPLATE_JSON,
    "generation_config.json",
    "config.json",
)

# Text handed to the library at once: bounds the memory its encodings take.
_BATCH_CHARACTERS = 4_000_000
# Stands for a user's words where the template's own are looked for.
_WORDS = "some words"
# Characters of a text that messages show.
_SHOWN = 40

Result = TypeVar("Result")


class Tokenizer:
    """Tokenizer with its special tokens and chat template.

    Attributes:
        bos_id: first token of a document, or None if the tokenizer has none.
        eos_id: last token of a document.
        stop_ids: tokens at which generation stops; EOS is the first.
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
        chat_template: str = DEFAULT_TEMPLATE,
        template_name: str = "chat template",
        stop_ids: Iterable[int] = (),
    ) -> None:
        """Wraps a loaded tokenizer.

        Args:
            backend: the tokenizer; loses its truncation and padding.
            bos_token, eos_token, pad_token: texts of special tokens.
            add_bos_token: see `begins_with_bos`; None asks the tokenizer.
            chat_template: Jinja source.
            template_name: what errors of the template begin with.
            stop_ids: tokens besides EOS at which generation stops.

        Raises:
            InputError: a special token is not in the vocabulary.
        """
        backend.no_truncation()
        backend.no_padding()
        _try(backend)
        self._backend = backend
        self.bos_id = None if bos_token is None else self._special_id("bos_token", bos_token)
        self.eos_id = self._special_id("eos_token", eos_token)
        self.pad_id = self.eos_id if pad_token is None else self._special_id("pad_token", pad_token)
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *stop_ids]))
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        if add_bos_token is None:
            special = _call("cannot encode", backend.encode, "", add_special_tokens=True).ids
            add_bos_token = special[:1] == [self.bos_id]
        self.begins_with_bos = add_bos_token and self.bos_id is not None
        self._bos, self._eos = bos_token or "", eos_token
        variables = {"bos_token": self._bos, "eos_token": eos_token}
        if pad_token is not None:
            variables["pad_token"] = pad_token
        self.chat_template = chat_template
        self._template = ChatTemplate(chat_template, variables, template_name)
        self._blanks: dict[int, bool] = {}

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face folder.

        That is ``tokenizer.json`` and ``tokenizer_config.json``, the chat template where it lies
        (DeepSeek's if there is none), and ``eos_token_id`` of ``generation_config.json``, or else
        of ``config.json``. Raises InputError that names the file and the key.
        """
        tokenizer_path, config_path, *_ = (Path(folder) / n for n in TOKENIZER_FILES)
        config = read_json(config_path)
        if not isinstance(config, dict):
            raise InputError(f"{config_path}: expected a JSON object")
        eos_token = _token_text(config, "eos_token", config_path)
        if eos_token is None:
            raise InputError(f"{config_path}: eos_token: missing; expected the token ending a text")
        bos_token = _token_text(config, "bos_token", config_path)
        pad_token = _token_text(config, "pad_token", config_path)
        add_bos_token = config.get("add_bos_token")
        if add_bos_token is not None:
            checked(bool, add_bos_token, f"{config_path}: add_bos_token")
        template, template_name = read_template(Path(folder), config, config_path)
        backend = _load_backend(tokenizer_path)
        stop_ids = _stop_ids(Path(folder), backend)
        try:
            return cls(
                backend,
                bos_token=bos_token,
                eos_token=eos_token,
                pad_token=pad_token,
                add_bos_token=add_bos_token,
                chat_template=template,
                template_name=template_name,
                stop_ids=stop_ids,
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
        return _call("cannot encode", self._backend.encode, text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """``encode`` of each text in turn, in bulk: several times as fast."""
        start = 0
        while start < len(texts):
            stop, characters = start, 0
            while stop < len(texts) and characters < _BATCH_CHARACTERS:
                characters += len(texts[stop])
                stop += 1
            batch = list(texts[start:stop])
            try:
                encodings = _call(
                    "cannot encode",
                    self._backend.encode_batch_fast,
                    batch,
                    add_special_tokens=False,
                )
            except InputError:
                yield from map(self.encode, batch)  # fails at the text that it is about
            else:
                yield from (encoding.ids for encoding in encodings)
            start = stop

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """Token ids of a whole chat, and which of them are to be learned; see `encode_chats`."""
        return next(self.encode_chats([messages]))

    def encode_chats(
        self, chats: Iterable[Sequence[Message]]
    ) -> Iterator[tuple[list[int], list[bool]]]:
        """Token ids of whole chats, and which of them are to be learned; in bulk.

        Learned are the assistant's words (see `ChatTemplate.pieces`) and the stop token that ends
        them, unless the message has ``mask`` false; never the first token.

        Raises:
            InputError: for a chat, once those before it are taken: the template fails, or a learned
                turn does not end in a stop token.
        """
        chats = [self._without_eos(messages) for messages in chats]
        rendered: list[list[Piece]] = []
        failure = None
        try:
            for pieces in self._template.pieces_of_chats(chats):
                rendered.append(pieces)
        except InputError as error:
            failure = error
        encoded = self.encode_batch([piece.text for pieces in rendered for piece in pieces])
        for messages, pieces in zip(chats, rendered, strict=False):
            self._check_contents(messages, pieces, learned=True)
            tokens: list[int] = []
            learn: list[bool] = []
            # Where what is learned of each turn begins and ends.
            spans: dict[int, tuple[int, int]] = {}
            for piece in pieces:
                begin = len(tokens)
                tokens += next(encoded)
                learn += [piece.turn is not None] * (len(tokens) - begin)
                if piece.turn is not None:
                    spans[piece.turn] = spans.get(piece.turn, (begin,))[0], len(tokens)
            for number, message in enumerate(messages):
                if message["role"] == "assistant" and message.get("mask", True):
                    self._end_turn(number, tokens, learn, spans.get(number))
            yield tokens, [False, *learn[1:]]
        if failure is not None:
            raise failure

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids after which the assistant speaks; a prefix of the ``encode_chat`` ids."""
        messages = self._without_eos(messages)
        pieces = self._template.pieces(messages, add_generation_prompt=True)
        self._check_contents(messages, pieces)
        encoded = self.encode_batch([piece.text for piece in pieces])
        return [token for ids in encoded for token in ids]

    def encode_user(self, text: str) -> list[int]:
        """Token ids after which the assistant answers a user's text.

        A text that is a rendered chat already is not rendered again. It is one if it holds BOS or
        another token that the template alone writes around a user's words; or, since templates also
        write plain text, if it holds what comes before these words and ends in what follows them.
        Only BOS and blanks at its ends are brought to the form of the template.
        """
        marks = self._marks
        if not marks.found_in(text):
            return self.encode_prompt([Message(role="user", content=text)])
        if self._bos and text.lstrip().startswith(self._bos):
            text = text.lstrip()
        elif marks.begins_with_bos:
            text = self._bos + text
        closing = marks.closing.rstrip()
        if closing and text.rstrip().endswith(closing.lstrip()):
            text = text.rstrip() + marks.closing[len(closing) :]
        return self.encode(text)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of plain text after BOS, which is not put before a text that begins with it."""
        ids = self.encode(text)
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def bare(self, text: str) -> str:
        """A document without the BOS it begins with and the EOS it ends with, however many."""
        while self._bos and text.lstrip().startswith(self._bos):
            text = text.lstrip().removeprefix(self._bos)
        while text.rstrip().endswith(self._eos):
            text = text.rstrip().removesuffix(self._eos)
        return text

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> str:
        """The text of a chat, by the template."""
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)

    def _without_eos(self, messages: Sequence[Message]) -> list[Message]:
        """A chat whose answers do not end in EOS yet, which the template writes."""
        return [
            {**message, "content": self.bare(message["content"])}
            if message["role"] == "assistant"
            else message
            for message in messages
        ]

    def _check_contents(
        self, messages: Sequence[Message], pieces: Sequence[Piece], *, learned: bool = False
    ) -> None:
        """Refuse messages that are rendered already, hold nothing, or that the template cuts.

        Args:
            pieces: of the rendered chat.
            learned: whether answers are to be learned. Of those before a prompt, templates may
                leave the reasoning out.
        """
        text = _without_blanks("".join(piece.text for piece in pieces))
        for number, message in enumerate(messages):
            where, content = f"messages[{number}].content", message["content"]
            answer = message["role"] == "assistant"
            # An answer may well begin with a token that prompts end in, such as `<think>`.
            tokens = {self._bos} - {""} if answer else self._marks.tokens
            if token := next(filter(content.lstrip().startswith, tokens), None):
                raise InputError(
                    f"{where}: begins with {token!r}, as a rendered chat does; expected the "
                    "message alone, for the chat template to render"
                )
            if answer:
                if not learned or not message.get("mask", True):
                    continue
                if not content.strip():
                    raise InputError(
                        f"{where}: holds special tokens alone; expected an answer to learn, or "
                        "mask: false"
                    )
            # Templates may change the blanks.
            if _without_blanks(content) not in text:
                raise InputError(
                    f"{where}: {reprlib.repr(content)} is not, or not all of it, in what the chat "
                    "template renders; expected messages that it shows as they are"
                )

    def _end_turn(
        self, number: int, tokens: list[int], learn: list[bool], span: tuple[int, int] | None
    ) -> None:
        """Lets a turn be learned through the stop token that ends it, and no further.

        Templates write blanks after that token, or a second one, which serving never sees; or they
        end a turn with what begins the next one, and with it the stop token.

        Args:
            number: of the message.
            tokens: of the chat.
            learn: which of them are learned; changed.
            span: where what is learned of the turn begins and ends.
        """
        if span is None:
            raise InputError(
                f"messages[{number}]: the chat template renders nothing of it to be learned; "
                "expected its text, in a generation block if the template has some, or mask: false"
            )
        begin, end = span
        stop = end
        while stop > begin and (tokens[stop - 1] in self.stop_ids or self._blank(tokens[stop - 1])):
            stop -= 1
        while stop < len(tokens) and self._blank(tokens[stop]):
            stop += 1
        if stop == len(tokens) or tokens[stop] not in self.stop_ids:
            text = self._backend.decode(tokens[begin:end], skip_special_tokens=False)
            stops = " or ".join(repr(self._backend.id_to_token(i)) for i in self.stop_ids)
            raise InputError(
                f"messages[{number}]: the answer ends in {text[-_SHOWN:]!r}, not in a token at "
                f"which generation stops ({stops}); expected the token that ends it among "
                "eos_token_id of generation_config.json, or as eos_token of tokenizer_config.json"
            )
        learn[end:stop] = [True] * (stop - end)
        learn[stop] = True
        learn[stop + 1 : end] = [False] * (end - stop - 1)

    def _blank(self, token: int) -> bool:
        """Whether a token is nothing but white space."""
        if token not in self._blanks:
            text = self._backend.decode([token], skip_special_tokens=False)
            self._blanks[token] = not text.strip()
        return self._blanks[token]

    @functools.cached_property
    def _marks(self) -> "_Marks":
        """What the template writes around a user's words."""
        user = Message(role="user", content=_WORDS)
        try:
            text = self.render([user], add_generation_prompt=True)
        except InputError:  # it may render other chats
            return _Marks(False, "", "", frozenset({self._bos} - {""}))
        opening, _, closing = text.rpartition(_WORDS)
        begins_with_bos = bool(self._bos) and text.startswith(self._bos)
        opening = opening.removeprefix(self._bos)
        # A system text of the template's own is not written before a later turn.
        with contextlib.suppress(InputError):
            answer = Message(role="assistant", content=_WORDS)
            later = self.render([user, answer, user]).rpartition(_WORDS)[0]
            shared = common_length(opening[::-1], later[::-1])
            opening = opening[len(opening) - shared :] if shared else opening
        added = self._backend.get_added_tokens_decoder()
        tokens = {added[i].content for i in self.encode(opening) if i in added}
        # Others, such as that of a thought which begins, may well be in a user's words.
        tokens |= {
            added[i].content for i in self.encode(closing) if i in added and added[i].special
        }
        # Some vocabularies have added tokens of white space.
        marks = frozenset(token for token in tokens | {self._bos} if token.strip())
        return _Marks(begins_with_bos, opening, closing, marks)

    def _special_id(self, key: str, token: str) -> int:
        token_id = _call(f"cannot look up {key}", self._backend.token_to_id, token)
        if token_id is None:
            raise InputError(
                f"{key}: {reprlib.repr(token)} is not in the vocabulary of tokenizer.json"
            )
        return token_id


class _Marks(NamedTuple):
    """What a template writes around a user's words, by which a rendered chat is known.

    Attributes:
        begins_with_bos: whether BOS comes first.
        opening: right before the words; not BOS.
        closing: after them, up to where the assistant speaks.
        tokens: in either of them, and BOS; no user writes them.
    """

    begins_with_bos: bool
    opening: str
    closing: str
    tokens: frozenset[str]

    def found_in(self, text: str) -> bool:
        if any(token in text for token in self.tokens):
            return True
        opening, closing = self.opening.strip(), self.closing.strip()
        if not closing:
            return bool(opening) and text.lstrip().startswith(opening)
        return opening in text and text.rstrip().endswith(closing)


def _without_blanks(text: str) -> str:
    return "".join(text.split())


def _call(fault: str, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
    """Calls the tokenizers library, which raises bare exceptions, and panics.

    Args:
        fault: what an error says of `tokenizer.json`.
    """
    try:
        return function(*arguments, **options)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise InputError(f"tokenizer.json: {fault}: {one_line(error)}") from error
        raise


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Keeps what the library writes of its panics, a page each, from the terminal."""
    try:
        stderr = os.dup(2)
    except OSError:  # closed
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


def _load_backend(path: Path) -> tokenizers.Tokenizer:
    definition = read_text(path)
    try:
        with _without_stderr():
            return _call("not a tokenizer", tokenizers.Tokenizer.from_str, definition)
    except InputError as error:
        raise InputError(f"{path.parent}: {error}") from error


def _try(backend: tokenizers.Tokenizer) -> None:
    """Encodes and decodes something: many a fault of a tokenizer shows no earlier."""
    if not backend.get_vocab_size():
        raise InputError("tokenizer.json: the vocabulary is empty")
    with _without_stderr():
        for special in (False, True):
            encode = backend.encode
            ids = _call("cannot encode", encode, _WORDS, add_special_tokens=special).ids
        _call("cannot decode", backend.decode, ids)


def _token_text(config: dict[str, Any], key: str, path: Path) -> str | None:
    """A special token of the configuration: plain text, or an object with its ``content``."""
    token, where = config.get(key), f"{path}: {key}"
    if token is None:
        return None
    if isinstance(token, dict):
        if "content" not in token:
            raise InputError(f"{where}.content: missing; expected the text of the token")
        token, where = token["content"], f"{where}.content"
    return checked(str, token, where)


def _stop_ids(folder: Path, backend: tokenizers.Tokenizer) -> list[int]:
    """Where generation stops besides EOS: by the first of two files that says it."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        config = read_json(path) if os.path.lexists(path) else {}
        if not isinstance(config, dict):
            raise InputError(f"{path}: expected a JSON object")
        value = config.get("eos_token_id")
        if value is None:
            continue
        where = f"{path}: eos_token_id"
        ids = (
            checked(list[int], value, where)
            if isinstance(value, list)
            else [checked(int, value, where)]
        )
        if not ids:
            raise InputError(f"{where}: is []; expected the ids at which generation stops")
        for token_id in ids:
            if not 0 <= token_id < 1 << 32 or backend.id_to_token(token_id) is None:
                raise InputError(f"{where}: {token_id} is not in the vocabulary of tokenizer.json")
        return ids
    return []
