"""Parts of tokenized data: a share of the examples, held out."""

from collections.abc import Callable

import numpy as np
import pytest

from esft_jax.data.pipeline import pack
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.data.tokens import TokenizedData, tokenize
from esft_jax.errors import InputError

TEXTS = [{"text": f"the fox {i}"} for i in range(40)]


def texts(data: TokenizedData, tokenizer: Tokenizer) -> set[str]:
    documents = data.documents
    return {
        tokenizer.decode(data.tokens[start : start + length].tolist())
        for start, length in zip(documents.starts, documents.lengths, strict=True)
    }


def test_a_share_is_held_out_by_what_examples_say(
    tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    data = tokenize([jsonl(*TEXTS)], tokenizer)
    train, valid = data.split(0.1)
    assert (len(train.documents), len(valid.documents)) == (36, 4)
    held_out = texts(valid, tokenizer)
    assert held_out | texts(train, tokenizer) == {record["text"] for record in TEXTS}
    # Neither order, nor names, nor how they are stored, nor the tokenizer changes it.
    same = [{"question": "x", "answer": "y"} | {"text": r["text"], "id": 7} for r in TEXTS[::-1]]
    other = Tokenizer(tokenizer._backend, bos_token=None, eos_token="<pad>")
    again = tokenize([jsonl(*same, name="other.jsonl")], other, "text").split(0.1)[1]
    assert texts(again, tokenizer) == held_out
    # What says the same is on one side, and more data move few examples.
    twice = tokenize([jsonl(*TEXTS, *TEXTS)], tokenizer).split(0.1)
    assert len(twice[1].documents) == 8 and texts(twice[1], tokenizer) == held_out
    more = tokenize([jsonl(*TEXTS, {"text": "the dog"})], tokenizer).split(0.1)[1]
    assert len(texts(more, tokenizer) ^ held_out) <= 1


def test_the_samples_of_a_chat_stay_together(
    tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    turns = [{"role": role, "content": "the"} for role in ("user", "assistant")] * 2
    chats = [{"messages": [turns[0] | {"content": f"fox {i}"}, *turns[1:]]} for i in range(8)]
    # A template that rewrites what was said: two samples of each chat.
    template = (
        "{% for m in messages %}{% if loop.last or m.role == 'user' or add_generation_prompt %}"
        "{{ m.content }}{% endif %}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    own = Tokenizer(tokenizer._backend, bos_token=None, eos_token="<eos>", chat_template=template)
    train, valid = tokenize([jsonl(*chats)], own).split(0.25)
    lines = [set(part.documents.lines.tolist()) for part in (train, valid)]
    assert len(train.documents) + len(valid.documents) == 16
    assert len(lines[1]) == 2 and not lines[0] & lines[1]


def test_shares_at_the_ends(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> None:
    data = tokenize([jsonl(*TEXTS[:2])], tokenizer)
    for share in (0.01, 0.99):
        assert [len(part.documents) for part in data.split(share)] == [1, 1]
    alike = tokenize([jsonl(TEXTS[0], TEXTS[0])], tokenizer)
    with pytest.raises(
        InputError, match=r"data.valid: 0.5 of .*data.jsonl, whose examples all say"
    ):
        alike.split(0.5)


def test_rows_of_a_part(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> None:
    path = jsonl(*TEXTS)
    data = tokenize([path], tokenizer)
    parts = [pack(part, tokenizer.pad_id, 32) for part in data.split(0.2)]
    whole = pack(data, tokenizer.pad_id, 32)
    for name in ("examples", "tokens", "target_tokens", "text_bytes"):
        assert sum(getattr(part.stats, name) for part in parts) == getattr(whole.stats, name)
    places = [set(part.places(range(len(part)))) for part in parts]
    assert len(places[0]) + len(places[1]) == 40 and not places[0] & places[1]
    assert sum(part.gather(range(len(part)))["loss_weights"].sum() for part in parts) == float(
        np.count_nonzero(data.learn)
    )
