"""From records to tokens: all documents of some paths in one flat array.

T tokens of D documents; a document is a text, or a sample of a chat.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Int32, Int64, UInt16, UInt64

from esft_jax.data.chat import Chat
from esft_jax.data.formats import Format, RecordFormat, record_format
from esft_jax.data.read import ChatExample, TextExample, read_chat, read_text
from esft_jax.data.records import expand, read_records, size_of, source_sha256
from esft_jax.data.token_cache import LARGE, KeptArrays, TokenCache
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.progress import Progress

Encoded = TypeVar("Encoded")
# Examples encoded together: enough to keep the tokenizer's threads busy.
_CHUNK = 1024
# Arrays of `Documents`, and what `array` calls their types.
_DOCUMENTS = {
    "starts": "q",
    "lengths": "q",
    "targets": "q",
    "text_bytes": "q",
    "contents": "Q",
    "sources": "i",
    "lines": "q",
}


@dataclass(frozen=True)
class Documents:
    """Documents of a flat token array, and where they were read.

    Attributes:
        starts: first token of each, ascending.
        lengths: tokens of each.
        targets: tokens of each that have a loss.
        text_bytes: UTF-8 bytes of each text; 0 for chats.
        contents: hash of what each one's example says.
        sources: index in `paths` of where each one was read.
        lines: number of its record there, from 1.
    """

    starts: Int64[np.ndarray, "D"]
    lengths: Int64[np.ndarray, "D"]
    targets: Int64[np.ndarray, "D"]
    text_bytes: Int64[np.ndarray, "D"]
    contents: UInt64[np.ndarray, "D"]
    sources: Int32[np.ndarray, "D"]
    lines: Int64[np.ndarray, "D"]
    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.starts)

    def place(self, token: int) -> str:
        """`path:line` of the document that holds a token."""
        document = np.searchsorted(self.starts, token, side="right") - 1
        return f"{self.paths[self.sources[document]]}:{self.lines[document]}"

    def take(self, which: Bool[np.ndarray, "D"]) -> Documents:
        """Some of them."""
        return Documents(
            self.starts[which],
            self.lengths[which],
            self.targets[which],
            self.text_bytes[which],
            self.contents[which],
            self.sources[which],
            self.lines[which],
            self.paths,
        )


@dataclass(frozen=True)
class TokenizedData:
    """All that some paths hold, as tokens.

    Attributes:
        tokens: of all documents; in 16 bits where the vocabulary fits into them.
        learn: which of them have a loss; never the first of a document.
        documents: those that belong to it.
        format: that the records have.
        untaught: texts that are too short to hold a target, and are left out.
        sha256: hash of each path's content.
        kept: whether the tokens were found in a cache.
    """

    tokens: Int32[np.ndarray, "T"] | UInt16[np.ndarray, "T"]
    learn: Bool[np.ndarray, "T"]
    documents: Documents
    format: RecordFormat
    untaught: int
    sha256: dict[str, str]
    kept: bool = False

    def split(self, share: float, key: str = "data.valid") -> tuple[TokenizedData, TokenizedData]:
        """Two parts, the second of which holds a share of the different examples.

        Which ones is decided by what they say alone: not by their order, a seed, or the tokenizer.
        Examples that say the same are in the same part.

        Args:
            key: of the share, for messages.

        Raises:
            InputError: all examples say the same.
        """
        contents = np.unique(self.documents.contents)
        if len(contents) < 2:
            raise InputError(
                f"{key}: {share} of {', '.join(self.sha256)}, whose examples all say the same; "
                "expected at least two that differ"
            )
        count = min(max(round(share * len(contents)), 1), len(contents) - 1)
        held_out = self.documents.contents <= contents[count - 1]
        rest, part = self.documents.take(~held_out), self.documents.take(held_out)
        return replace(self, documents=rest), replace(self, documents=part, untaught=0)


def tokenize(
    paths: Sequence[str],
    tokenizer: Tokenizer,
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    format_key: str = "data.format",
    cache: TokenCache | None = None,
) -> TokenizedData:
    """Reads all records that paths name, and encodes them.

    Args:
        paths: see `esft_jax.data.records`.
        tokenizer: of the model.
        format: of the records; None recognises it.
        columns: their keys that differ from those of the format.
        format_key: what messages call `format`.
        cache: keeps the tokens of large data.

    Raises:
        InputError: naming file and line.
    """
    if not paths:
        raise InputError("data: no files given; expected at least one path")
    paths = expand(paths)
    found = record_format(read_records(paths), format, columns, format_key)
    sha256 = {path: source_sha256(path) for path in paths}

    def make() -> KeptArrays:
        flat = _FlatTokens(paths, tokenizer.vocab_size)
        size = sum(map(size_of, paths))
        with Progress("tokenize", size, unit="B", leave=False, shown=size >= LARGE) as progress:
            if found.is_chat:
                _add_chats(flat, read_chat(paths, found, progress.advance), tokenizer)
            else:
                _add_texts(flat, read_text(paths, found, progress.advance), tokenizer)
        return flat.arrays()

    kept = False
    if cache is not None and cache.takes(paths, tokenizer):
        key = {"sha256": list(sha256.values()), "format": str(found)}
        arrays, kept = cache.get(key, tokenizer, make)
    else:
        arrays = make()
    documents = Documents(**{name: arrays[name] for name in _DOCUMENTS}, paths=tuple(paths))
    return TokenizedData(
        arrays["tokens"],
        arrays["learn"].view(np.bool_),
        documents,
        found,
        int(arrays["untaught"][0]),
        sha256,
        kept,
    )


class _FlatTokens:
    """Grows one flat token array, document by document."""

    def __init__(self, paths: Sequence[str], vocab_size: int) -> None:
        self.untaught = 0
        self._paths = {path: i for i, path in enumerate(paths)}
        self._tokens = array("H" if vocab_size <= 1 << 16 else "i")
        self._learn = bytearray()
        self._documents = {name: array(kind) for name, kind in _DOCUMENTS.items()}

    def append(
        self, tokens: list[int], learn: bytes, where: str, content: int, text_bytes: int = 0
    ) -> bool:
        """Add a document, unless it has no target: tell whether it has one."""
        targets = learn.count(1, 1)
        if not targets:
            return False
        path, _, line = where.rpartition(":")
        values = {
            "starts": len(self._tokens),
            "lengths": len(tokens),
            "targets": targets,
            "text_bytes": text_bytes,
            "contents": content,
            "sources": self._paths[path],
            "lines": int(line),
        }
        for name, value in values.items():
            self._documents[name].append(value)
        self._tokens.extend(tokens)
        self._learn += b"\0"  # nothing predicts the first token
        self._learn += learn[1:]
        return True

    def arrays(self) -> KeptArrays:
        """What `TokenizedData` is made of."""
        return {
            "tokens": np.frombuffer(self._tokens, self._tokens.typecode),
            "learn": np.frombuffer(self._learn, np.uint8),
            "untaught": np.array([self.untaught]),
            **{
                name: np.frombuffer(values, values.typecode)
                for name, values in self._documents.items()
            },
        }


def _add_texts(flat: _FlatTokens, examples: Iterator[TextExample], tokenizer: Tokenizer) -> None:
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    while chunk := list(itertools.islice(examples, _CHUNK)):
        texts = [tokenizer.bare(example.text) for example in chunk]
        for example, text, ids in zip(
            chunk, texts, _placed(chunk, tokenizer.encode_batch(texts)), strict=True
        ):
            tokens = [*bos, *ids, tokenizer.eos_id]
            said = text.encode()
            if not flat.append(tokens, b"\1" * len(tokens), example.where, _hash(said), len(said)):
                flat.untaught += 1


def _add_chats(flat: _FlatTokens, examples: Iterator[ChatExample], tokenizer: Tokenizer) -> None:
    while chunk := list(itertools.islice(examples, _CHUNK)):
        encoded = tokenizer.encode_chats(Chat(e.messages, e.tools) for e in chunk)
        for example, samples in zip(chunk, _placed(chunk, encoded), strict=True):
            content = _hash(json.dumps([example.messages, example.tools], sort_keys=True).encode())
            for tokens, learned in samples:
                if not flat.append(tokens, bytes(learned), example.where, content):
                    raise InputError(
                        f"{example.where}: messages: no target; the chat template shows nothing of "
                        "what is to be learned"
                    )


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())


def _placed(
    examples: Sequence[ChatExample] | Sequence[TextExample], encoded: Iterator[Encoded]
) -> Iterator[Encoded]:
    """What examples are encoded to; an `InputError` of one names its place."""
    for example in examples:
        try:
            yield next(encoded)
        except InputError as error:
            raise InputError(f"{example.where}: {error}") from error
