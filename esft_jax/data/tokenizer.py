"""A Hugging Face tokenizer folder: text to ids and back, chats as its template renders them."""

import contextlib
import functools
import hashlib
import json
import reprlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from esft_jax.data.chat import Chat, Message, reasoning
from esft_jax.data.chat_template import (
    DEFAULT_TEMPLATE,
    TEMPLATE_FILE,
    TEMPLATE_JSON,
    ChatFormat,
    ChatTemplate,
    read_template,
)
from esft_jax.data.samples import Sample, common_length, lead
from esft_jax.data.tokenizer_files import (
    WORDS,
    call,
    load_backend,
    read_stop_ids,
    token_text,
    try_backend,
)
from esft_jax.errors import InputError
from esft_jax.files import checked, read_json

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
# Characters of a text that messages show.
_SHOWN = 40


class Encoded(NamedTuple):
    """A sample as tokens, and which of them are to be learned; never the first."""

    tokens: list[int]
    learn: list[bool]


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
        chat_format: what of the chats is not as the model's folder says.
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
        chat_format: ChatFormat | None = None,
    ) -> None:
        """Wraps a loaded tokenizer.

        Args:
            backend: the tokenizer; loses its truncation and padding.
            bos_token, eos_token, pad_token: texts of special tokens.
            add_bos_token: see `begins_with_bos`; None asks the tokenizer.
            chat_template: Jinja source.
            template_name: what errors of the template begin with.
            stop_ids: tokens besides EOS at which generation stops.
            chat_format: replaces `chat_template` if it has one, and adds to it.

        Raises:
            InputError: a special token is not in the vocabulary.
        """
        backend.no_truncation()
        backend.no_padding()
        try_backend(backend)
        self._backend = backend
        self.bos_id = None if bos_token is None else self._special_id("bos_token", bos_token)
        self.eos_id = self._special_id("eos_token", eos_token)
        self.pad_id = self.eos_id if pad_token is None else self._special_id("pad_token", pad_token)
        self.chat_format = chat = chat_format or ChatFormat()
        self._last_id = None  # of an answer that the template writes no end for
        if chat.stop_token is not None:
            self._last_id = self._special_id("data.stop_token", chat.stop_token)
            stop_ids = [*stop_ids, self._last_id]
        self.stop_ids = tuple(dict.fromkeys([self.eos_id, *stop_ids]))
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        if add_bos_token is None:
            special = call("cannot encode", backend.encode, "", add_special_tokens=True).ids
            add_bos_token = special[:1] == [self.bos_id]
        self.begins_with_bos = add_bos_token and self.bos_id is not None
        self._bos, self._eos = bos_token or "", eos_token
        variables = {"bos_token": self._bos, "eos_token": eos_token}
        if pad_token is not None:
            variables["pad_token"] = pad_token
        if chat.template is not None:
            chat_template, template_name = chat.template, "data.chat_template: chat template"
        self.chat_template = chat_template
        self._template = ChatTemplate(chat_template, variables, template_name, chat.arguments)
        self._blanks: dict[int, bool] = {}

    @classmethod
    def load(cls, folder: str | Path, chat_format: ChatFormat | None = None) -> "Tokenizer":
        """Reads the tokenizer of a Hugging Face folder.

        That is ``tokenizer.json`` and ``tokenizer_config.json``, the chat template where it lies
        (DeepSeek's if there is none), and ``eos_token_id`` of ``generation_config.json``, or else
        of ``config.json``. Raises InputError that names the file and the key.
        """
        tokenizer_path, config_path, *_ = (Path(folder) / n for n in TOKENIZER_FILES)
        config = read_json(config_path)
        if not isinstance(config, dict):
            raise InputError(f"{config_path}: expected a JSON object")
        eos_token = token_text(config, "eos_token", config_path)
        if eos_token is None:
            raise InputError(f"{config_path}: eos_token: missing; expected the token ending a text")
        bos_token = token_text(config, "bos_token", config_path)
        pad_token = token_text(config, "pad_token", config_path)
        add_bos_token = config.get("add_bos_token")
        if add_bos_token is not None:
            checked(bool, add_bos_token, f"{config_path}: add_bos_token")
        template, template_name = DEFAULT_TEMPLATE, "chat template"
        if chat_format is None or chat_format.template is None:
            template, template_name = read_template(Path(folder), config, config_path)
        backend = load_backend(tokenizer_path)
        stop_ids = read_stop_ids(Path(folder), backend)
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
                chat_format=chat_format,
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

    @functools.cached_property
    def definition_sha256(self) -> str:
        """Hash of all that decides which tokens a text or a chat has, but for `depends_on_time`."""
        content = {
            "backend": self._backend.to_str(),
            "special": [self._bos, self._eos, self.pad_id],
            "stop_ids": self.stop_ids,
            "chat_template": self.chat_template,
            "chat_format": self.chat_format.to_json(),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def depends_on_time(self) -> bool:
        """Whether the chat template shows the time."""
        return "strftime_now" in self.chat_template

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no special token is added."""
        return call("cannot encode", self._backend.encode, text, add_special_tokens=False).ids

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
                encodings = call(
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

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids, special tokens left out unless it is said otherwise."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def answer(self, ids: Sequence[int]) -> str:
        """What a completion says to the user: what comes after its thoughts and headers, if the
        template has some.
        """
        ids, before = list(ids), self._lead
        ends = (end for end in range(len(ids), 0, -1) if ids[end - len(before) : end] == before)
        begin = next(ends, 0) if before else 0
        return self.decode(ids[begin:]).lstrip() if begin else self.decode(ids)

    @functools.cached_property
    def _lead(self) -> list[int]:
        """What the template writes before the words of an answer."""
        user, words = Message(role="user", content="a"), "zq00000xj"
        prompt = self.render([user], add_generation_prompt=True)
        answer = self.render([user, Message(role="assistant", content=words)])
        return self.encode(lead(prompt, answer, words))

    def encode_chat(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[Encoded]:
        """Token ids of the samples of a chat, and which of them are learned; see `encode_chats`."""
        return next(self.encode_chats([Chat(messages, tools)]))

    def encode_chats(self, chats: Iterable[Chat]) -> Iterator[list[Encoded]]:
        """Token ids of the samples of chats, and which of them are to be learned; in bulk.

        A chat is one sample, or one for each learned answer (see `esft_jax.data.samples`). Learned
        are the assistant's words and the stop token that ends them, unless the message has ``mask``
        false; never the first token.

        Raises:
            InputError: for a chat, once those before it are taken: the template fails, leaves out
                what was said, or a learned turn does not end in a stop token.
        """
        chats = [Chat(self._without_eos(chat.messages), chat.tools) for chat in chats]
        found: list[list[Sample]] = []
        failure = None
        try:
            for samples in self._template.samples_of_chats(chats):
                found.append(samples)
        except InputError as error:
            failure = error
        texts = [piece.text for samples in found for sample in samples for piece in sample.pieces]
        encoded = self.encode_batch(texts)
        for chat, samples in zip(chats, found, strict=False):
            result: list[Encoded] = []
            for sample in samples:
                self._check_contents(chat.messages, sample)
                result += self._encode(chat.messages, sample, encoded)
            yield result
        if failure is not None:
            raise failure

    def _encode(
        self, messages: Sequence[Message], sample: Sample, encoded: Iterator[list[int]]
    ) -> list[Encoded]:
        """A sample as tokens. It takes several samples where answers are given other ends.

        Args:
            messages: of the chat.
            encoded: the tokens of its pieces, and others after them.
        """
        tokens: list[int] = []
        learn: list[bool] = []
        spans: dict[int, _Span] = {}
        for piece in sample.pieces:
            begin = len(tokens)
            tokens += next(encoded)
            if piece.turn is None:
                learn += [False] * (len(tokens) - begin)
            else:
                learn += self._learned(messages[piece.turn], piece.text, len(tokens) - begin)
                first = spans[piece.turn].begin if piece.turn in spans else begin
                spans[piece.turn] = _Span(first, len(tokens), begin, piece.text)
        cut: list[Encoded] = []
        for turn in sample.turns:
            self._end_turn(turn, messages[turn], tokens, learn, spans.get(turn), cut)
        found = [*cut, Encoded(tokens, learn)] if any(learn) or not cut else cut
        return [Encoded(tokens, [False, *learn[1:]]) for tokens, learn in found]

    def encode_prompt(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Token ids after which the assistant speaks: where `encode_chat` has them, they begin so.

        Raises:
            InputError: the template fails, or leaves out what was said.
        """
        messages = self._without_eos(messages)
        sample = self._template.prompt(Chat(messages, tools))
        self._check_contents(messages, sample)
        encoded = self.encode_batch([piece.text for piece in sample.pieces])
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

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """The text of a chat, by the template."""
        chat = Chat(messages, tools)
        return self._template.render(chat, add_generation_prompt=add_generation_prompt)

    def _without_eos(self, messages: Sequence[Message]) -> list[Message]:
        """A chat whose answers do not end in EOS yet, which the template writes."""
        return [
            self._bare_answer(message) if message["role"] == "assistant" else message
            for message in messages
        ]

    def _bare_answer(self, message: Message) -> Message:
        content = message["content"]
        bare = self.bare(content)
        changed: Message = {**message, "content": bare}
        if "spans" in message:
            begin = content.find(bare)  # BOS was before it
            changed["spans"] = [(max(i - begin, 0), j - begin) for i, j in message["spans"]]
        return changed

    def _check_contents(self, messages: Sequence[Message], sample: Sample) -> None:
        """Refuse messages that are rendered already, hold nothing, or that the template cuts.

        Of answers that are not learned, such as those before a prompt, templates may leave the
        reasoning out.
        """
        text = _without_blanks("".join(piece.text for piece in sample.pieces))
        learned = {i: "".join(p.text for p in sample.pieces if p.turn == i) for i in sample.turns}
        for number, message in enumerate(messages[: sample.num_messages]):
            where, content = f"messages[{number}]", message["content"]
            answer = message["role"] == "assistant"
            # An answer may well begin with a token that prompts end in, such as `<think>`.
            tokens = {self._bos} - {""} if answer else self._marks.tokens
            if token := next(filter(content.lstrip().startswith, tokens), None):
                raise InputError(
                    f"{where}.content: begins with {token!r}, as a rendered chat does; expected "
                    "the message alone, for the chat template to render"
                )
            if answer:
                if number not in sample.turns:
                    continue
                if not content.strip() and "tool_calls" not in message:
                    raise InputError(
                        f"{where}.content: holds special tokens alone; expected an answer to "
                        "learn, or mask: false"
                    )
                self._check_reasoning(where, message, _without_blanks(learned[number]))
            # Templates may change the blanks, and show results of tools as JSON.
            if not any(_without_blanks(shown) in text for shown in _spellings(content)):
                raise InputError(
                    f"{where}.content: {reprlib.repr(content)} is not, or not all of it, in what "
                    "the chat template renders; expected messages that it shows as they are, or "
                    "another template (data.chat_template)"
                )

    def _check_reasoning(self, where: str, message: Message, learned: str) -> None:
        """Refuse reasoning that is not in what is learned of its message."""
        for key, part in reasoning(message).items():
            if _without_blanks(part) not in learned:
                raise InputError(
                    f"{where}.{key}: {reprlib.repr(part)} is not, or not all of it, in what the "
                    "chat template renders to be learned; expected a template that shows it "
                    "(data.chat_template), or messages without it"
                )

    def _learned(self, message: Message, text: str, count: int) -> list[bool]:
        """Which tokens of a piece are learned: all, or those that hold characters of `spans`.

        Args:
            count: of the tokens.
        """
        if "spans" not in message:
            return [True] * count
        content = message["content"]
        begin = text.rfind(content.strip())
        if begin < 0:  # another piece of the turn
            return [False] * count
        begin -= len(content) - len(content.lstrip())
        encode = self._backend.encode
        places = call("cannot encode", encode, text, add_special_tokens=False).offsets
        return [
            any(begin + first < end and start < begin + last for first, last in message["spans"])
            for start, end in places
        ]

    def _end_turn(
        self,
        number: int,
        message: Message,
        tokens: list[int],
        learn: list[bool],
        span: "_Span | None",
        cut: list[Encoded],
    ) -> None:
        """Lets a turn be learned through the stop token that ends it, and no further.

        Templates write blanks after that token, or a second one, which serving never sees; or they
        end a turn with what begins the next one, and with it the stop token.

        Args:
            number: of the message.
            message: the message.
            tokens: of the chat.
            learn: which of them are learned; changed.
            span: what is learned of the turn.
            cut: takes a turn that the template writes no stop token for, with `data.stop_token`.
        """
        if span is None:
            raise InputError(
                f"messages[{number}]: the chat template renders nothing of it to be learned; "
                "expected its text, in a generation block if the template has some, or mask: false"
            )
        begin, end = span.begin, span.end
        if "spans" in message and not any(learn[begin:end]):
            raise InputError(
                f"messages[{number}].train_detail: the chat template does not show the content as "
                "it is, in which characters were counted; expected one that does "
                "(data.chat_template), or no spans"
            )
        stop = end
        while stop > begin and (tokens[stop - 1] in self.stop_ids or self._blank(tokens[stop - 1])):
            stop -= 1
        while stop < len(tokens) and self._blank(tokens[stop]):
            stop += 1
        if stop == len(tokens) or tokens[stop] not in self.stop_ids:
            if self._last_id is not None:
                text = span.last_text.rstrip()
                last = [*self.encode(text), self._last_id]
                flags = [i >= begin and learn[i] for i in range(span.last)]
                flags += [*self._learned(message, text, len(last) - 1), True]
                if stop == len(tokens):  # nothing comes after it: other turns may stay
                    tokens[span.last :], learn[span.last :] = last, flags[span.last :]
                    return
                cut.append(Encoded([*tokens[: span.last], *last], flags))
                learn[begin:end] = [False] * (end - begin)
                return
            text = self.decode(tokens[begin:end], skip_special_tokens=False)
            stops = " or ".join(repr(self._backend.id_to_token(i)) for i in self.stop_ids)
            raise InputError(
                f"messages[{number}]: the answer ends in {text[-_SHOWN:]!r}, not in a token at "
                f"which generation stops ({stops}); expected the token that ends it as "
                "data.stop_token, among eos_token_id of generation_config.json, or as eos_token of "
                "tokenizer_config.json"
            )
        learn[end:stop] = [True] * (stop - end)
        learn[stop] = True
        learn[stop + 1 : end] = [False] * (end - stop - 1)

    def _blank(self, token: int) -> bool:
        """Whether a token is nothing but white space."""
        if token not in self._blanks:
            text = self.decode([token], skip_special_tokens=False)
            self._blanks[token] = not text.strip()
        return self._blanks[token]

    @functools.cached_property
    def _marks(self) -> "_Marks":
        """What the template writes around a user's words."""
        user = Message(role="user", content=WORDS)
        try:
            text = self.render([user], add_generation_prompt=True)
        except InputError:  # it may render other chats
            return _Marks(False, "", "", frozenset({self._bos} - {""}))
        opening, _, closing = text.rpartition(WORDS)
        begins_with_bos = bool(self._bos) and text.startswith(self._bos)
        opening = opening.removeprefix(self._bos)
        # A system text of the template's own is not written before a later turn.
        with contextlib.suppress(InputError):
            answer = Message(role="assistant", content=WORDS)
            later = self.render([user, answer, user]).rpartition(WORDS)[0]
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
        token_id = call(f"cannot look up {key}", self._backend.token_to_id, token)
        if token_id is None:
            raise InputError(
                f"{key}: {reprlib.repr(token)} is not in the vocabulary of tokenizer.json"
            )
        return token_id


class _Span(NamedTuple):
    """What is learned of a turn: tokens `begin` to `end`, of which the last piece has a text."""

    begin: int
    end: int
    last: int
    last_text: str


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


def _spellings(text: str) -> Iterator[str]:
    """A text as it is, and as a part of JSON."""
    yield text
    for ascii in (False, True):
        yield json.dumps(text, ensure_ascii=ascii)[1:-1]
