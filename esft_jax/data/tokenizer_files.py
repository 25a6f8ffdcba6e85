"""What a Hugging Face folder says of its tokenizer, and the library that runs it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import tokenizers

from esft_jax.errors import InputError, one_line
from esft_jax.files import checked, read_json, read_text

# Stands for a user's words where the template's own are looked for.
WORDS = "some words"

Result = TypeVar("Result")


def call(fault: str, function: Callable[..., Result], *arguments: Any, **options: Any) -> Result:
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
    """Keeps the library's reports of panics, a page each, from the terminal."""
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


def load_backend(path: Path) -> tokenizers.Tokenizer:
    """The library's tokenizer of a `tokenizer.json`; an `InputError` names its folder."""
    definition = read_text(path)
    try:
        with _without_stderr():
            return call("not a tokenizer", tokenizers.Tokenizer.from_str, definition)
    except InputError as error:
        raise InputError(f"{path.parent}: {error}") from error


def try_backend(backend: tokenizers.Tokenizer) -> None:
    """Encodes and decodes something: many faults of a tokenizer show only then."""
    if not backend.get_vocab_size():
        raise InputError("tokenizer.json: the vocabulary is empty")
    with _without_stderr():
        for special in (False, True):
            encode = backend.encode
            ids = call("cannot encode", encode, WORDS, add_special_tokens=special).ids
        call("cannot decode", backend.decode, ids)


def token_text(config: dict[str, Any], key: str, path: Path) -> str | None:
    """A special token of the configuration: plain text, or an object with its ``content``."""
    token, where = config.get(key), f"{path}: {key}"
    if token is None:
        return None
    if isinstance(token, dict):
        if "content" not in token:
            raise InputError(f"{where}.content: missing; expected the text of the token")
        token, where = token["content"], f"{where}.content"
    return checked(str, token, where)


def read_stop_ids(folder: Path, backend: tokenizers.Tokenizer) -> list[int]:
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
