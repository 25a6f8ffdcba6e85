"""What a run, its scores and its adapter are bound to: all that makes a base model what it is.

Weights alone do not: `config.json` says what is computed with them, the tokenizer and its chat
template what their tokens mean.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from esft_jax.data.chat_template import ChatFormat
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.files import checked, read_json

# Key in manifests, provenance and facts, and what it is the hash of.
PARTS = {
    "base_fingerprint": "weights",
    "config_fingerprint": "config.json",
    "tokenizer_fingerprint": "tokenizer or chat format",
}


def tokenizer_fingerprint(folder: Path, tokenizer: Tokenizer) -> str:
    """Hash of all that decides which tokens a text has, and what a chat looks like.

    It does not depend on how the files are laid out, nor on the version of the library.

    Args:
        folder: where the tokenizer was loaded from.
    """
    definition = read_json(folder / "tokenizer.json")
    content = {
        "definition": {
            key: value for key, value in definition.items() if key not in ("truncation", "padding")
        },
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "stop_ids": sorted(tokenizer.stop_ids),
        "begins_with_bos": tokenizer.begins_with_bos,
        "chat_template": tokenizer.chat_template,
    }
    # As it was before there were these.
    content |= {k: v for k, v in tokenizer.chat_format.to_json().items() if k != "template"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def chat_record(chat_format: ChatFormat) -> dict[str, Any]:
    """What is recorded of a chat format, beside hashes, to render chats alike again."""
    content = chat_format.to_json()
    return {"chat": content} if content else {}


def recorded_chat(record: Mapping[str, Any] | None, where: str) -> ChatFormat:
    """The chat format of a record; that of the model's folder if it says none.

    Args:
        where: what messages begin with: the file of the record.

    Raises:
        InputError: it is no chat format.
    """
    return checked(ChatFormat, (record or {}).get("chat", {}), f"{where}: chat")


def check_same_base(
    recorded: Mapping[str, Any], base: Mapping[str, Any], where: str, what: str
) -> None:
    """Compare what two records say of their base models, as far as both say it.

    Args:
        where: what the message begins with: the file of the first record.
        what: was done with its base, such as "trained on".

    Raises:
        InputError: they differ; names the part.
    """
    for key, part in PARTS.items():
        before, now = recorded.get(key), base.get(key)
        if before is not None and now is not None and before != now:
            raise InputError(
                f"{where}: {key}: {what} another base: its {part} had the hash "
                f"{str(before)[:12]}..., here it is {str(now)[:12]}..."
            )
