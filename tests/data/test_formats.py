"""Each format with a file of two records: what it says, and the same tokens as `messages`."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from esft_jax.data.formats import RecordFormat, fitting
from esft_jax.data.pipeline import build_dataset
from esft_jax.data.read import read_chat
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError


def turn(role: str, content: str, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


SYSTEM, USER, ANSWER = turn("system", "be brief"), turn("user", "the fox"), turn("assistant", "yes")
SECOND = [turn("user", "the dog"), turn("assistant", "jumps")]
CALL = {"name": "look", "arguments": {"at": "x"}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def said(*pairs: tuple[str, str], **others: Any) -> dict[str, Any]:
    return {"conversations": [{"from": role, "value": text} for role, text in pairs], **others}


# A format, its records, and the messages that they stand for.
RECORDS: dict[str, tuple[list[dict[str, Any]], list[list[dict[str, Any]]]]] = {
    "messages": (
        [{"messages": [SYSTEM, USER, ANSWER]}, {"messages": json.dumps(SECOND)}],
        [[SYSTEM, USER, ANSWER], SECOND],
    ),
    "sharegpt": (
        [
            said(("human", "the fox"), ("gpt", "yes"), system="be brief"),
            said(("Human", "the dog"), ("assistant", "jumps")),
            said(("system", "be brief"), ("user", "the fox"), ("gpt", "yes"), system=" be brief\n"),
        ],
        [[SYSTEM, USER, ANSWER], SECOND, [SYSTEM, USER, ANSWER]],
    ),
    "alpaca": (
        [
            {"instruction": "the fox", "input": "", "output": "yes", "system": "be brief"},
            {"instruction": "the", "input": "dog", "output": "jumps"},
            {
                "instruction": "the dog",
                "output": "jumps",
                "history": [["the fox", "yes"]],
            },
        ],
        [
            [SYSTEM, USER, ANSWER],
            [turn("user", "the\ndog"), SECOND[1]],
            [USER, ANSWER, *SECOND],
        ],
    ),
    "prompt_completion": (
        [
            {"prompt": "the fox", "completion": "yes", "system": "be brief"},
            {"prompt": [USER, ANSWER, SECOND[0]], "completion": [SECOND[1]]},
        ],
        [[SYSTEM, USER, ANSWER], [USER, ANSWER | {"mask": False}, *SECOND]],
    ),
    "question_answer": (
        [
            {"question": "the fox", "answer": "yes", "system": "be brief"},
            {"question": "the dog", "answer": "jumps"},
        ],
        [[SYSTEM, USER, ANSWER], SECOND],
    ),
}


@pytest.mark.parametrize("format", RECORDS)
def test_tokens_are_those_of_messages(
    format: str, tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    records, chats = RECORDS[format]
    found = build_dataset([jsonl(*records)], tokenizer, sequence_length=64)
    messages = [{"messages": chat} for chat in chats]
    expected = build_dataset([jsonl(*messages, name="m.jsonl")], tokenizer, sequence_length=64)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_array_equal(found.learn, expected.learn)
    assert found.describe().endswith(f"; read as {format}")
    assert expected.stats.target_tokens > len(chats)


def test_texts_are_recognised(tokenizer: Tokenizer, jsonl: Callable[..., str]) -> None:
    found = build_dataset([jsonl({"text": "the fox"})], tokenizer, sequence_length=64)
    assert found.describe().endswith("; read as text")
    assert found.tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode("the fox"), 1]


@pytest.mark.parametrize(
    ("record", "columns", "expected"),
    [
        ({"conversations": [USER, ANSWER]}, {}, "messages (messages: conversations)"),
        (
            {"conversation": said(("human", "a"), ("gpt", "b"))["conversations"]},
            {},
            "sharegpt (messages: conversation)",
        ),
        ({"chat": [USER, ANSWER]}, {"messages": "chat"}, "messages (messages: chat)"),
        (
            {"chat": [{"by": "user", "says": "a"}, {"by": "assistant", "says": "b"}]},
            {"messages": "chat", "role": "by", "content": "says"},
            "messages (messages: chat, role: by, content: says)",
        ),
        (
            {"problem": "a", "solution": "b"},
            {"question": "problem", "answer": "solution"},
            "question_answer (question: problem, answer: solution)",
        ),
        (
            {"prompt": "a", "reply": "b"},
            {"completion": "reply"},
            "prompt_completion (completion: reply)",
        ),
        ({"body": "a"}, {"text": "body"}, "text (text: body)"),
    ],
)
def test_columns(
    record: dict[str, Any],
    columns: dict[str, str],
    expected: str,
    tokenizer: Tokenizer,
    jsonl: Callable[..., str],
) -> None:
    found = build_dataset([jsonl(record)], tokenizer, columns=columns, sequence_length=64)
    assert str(found.data.format) == expected


@pytest.mark.parametrize(
    ("record", "options", "message"),
    [
        (
            {"messages": [USER, ANSWER], "text": "a"},
            {},
            r"data.jsonl:1: may be messages or text; expected one of them as data.format",
        ),
        (
            {"instruction": "a", "output": "b", "text": "c"},
            {},
            "may be alpaca or text; expected",
        ),
        ({"question": "a", "answer": None}, {}, "in none of the formats messages, sharegpt"),
        ({"query": "a", "response": "b"}, {}, r"with columns: {question: query, answer: response}"),
        ({"text": "a"}, {"format": "chat"}, "data.format: is 'chat'; expected one of messages,"),
        ({"text": "a"}, {"columns": {"body": "text"}}, "data.columns: no format has body"),
        (
            {"text": "a"},
            {"columns": {"prompt": "a", "answer": "b"}},
            "data.columns: no format has prompt, answer",
        ),
        (
            {"text": "a"},
            {"columns": {"prompt": "a", "completion": "a"}},
            "data.columns: a is named twice",
        ),
    ],
)
def test_what_is_not_one_format_is_refused(
    record: dict[str, Any],
    options: dict[str, Any],
    message: str,
    tokenizer: Tokenizer,
    jsonl: Callable[..., str],
) -> None:
    with pytest.raises(InputError, match=message):
        build_dataset([jsonl(record)], tokenizer, sequence_length=64, **options)


def test_a_named_format_goes_before_what_is_recognised(
    tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    path = jsonl({"messages": [USER, ANSWER], "text": "a"})
    found = build_dataset([path], tokenizer, format="text", sequence_length=64)
    assert found.stats.text_bytes == 1


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([], r"messages: is \[\]; expected a list"),
        ("x", "messages: not valid JSON"),
        (["a"], r"messages\[0\]: is \"a\"; expected an object"),
        ([{"content": "a"}], r"messages\[0\].role: missing"),
        ([{"role": "user", "content": None}], r"messages\[0\].content: is null"),
    ],
)
def test_what_is_wrong_with_messages_is_said_best_where_they_are_read(
    turns: Any, message: str, tokenizer: Tokenizer, jsonl: Callable[..., str]
) -> None:
    with pytest.raises(InputError, match=message):
        build_dataset([jsonl({"messages": turns})], tokenizer, sequence_length=64)


def test_all_of_the_first_records_count() -> None:
    both = {"question": "a", "answer": "b", "text": "c"}
    assert [str(found) for found in fitting([both, {"text": "d"}])] == ["text"]
    assert fitting([{"text": "d"}, {"question": "a", "answer": "b"}]) == []


@pytest.mark.parametrize(
    ("format", "record", "message"),
    [
        (
            "sharegpt",
            said(("human", "a"), ("alien", "b")),
            r"conversations\[1\].from: is \"alien\"",
        ),
        ("sharegpt", said(("human", "a"), ("gpt", "")), r"conversations\[1\].value: is \"\"; exp"),
        ("sharegpt", said(("human", "a")), "conversations: no target"),
        (
            "sharegpt",
            said(("system", "a"), ("human", "a"), ("gpt", "b"), system="b"),
            'system: is "b" beside a message',
        ),
        ("sharegpt", said(("function_call", "{")), r"conversations\[0\].value: not valid JSON"),
        ("alpaca", {"instruction": "a", "output": " "}, 'output: is " "; expected an answer'),
        ("alpaca", {"instruction": 5, "output": "b"}, "instruction: is 5; expected a string"),
        ("alpaca", {"output": "b"}, "instruction: missing; expected a text"),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": ["c"]},
            r"history\[0\]: is \"c\"; expected \[instruction, output\]",
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "history": [["c", ""]]},
            r"history\[0\]: is \"\"; expected an answer",
        ),
        (
            "alpaca",
            {"instruction": "a", "output": "b", "system_prompt": "c"},
            'system_prompt: is "c"; no message says it',
        ),
        ("prompt_completion", {"prompt": [USER], "completion": "b"}, "completion: not valid JSON"),
        ("prompt_completion", {"prompt": "a", "completion": [ANSWER]}, "completion: is .*a string"),
        ("question_answer", {"question": "a", "answer": ["b"]}, r"answer: is \[\"b\"\]; expected"),
        ("question_answer", {"question": "a", "answer": "b", "weight": 2}, "weight: is 2; all"),
    ],
)
def test_a_wrong_record_is_named(
    format: Any, record: dict[str, Any], message: str, jsonl: Callable[..., str]
) -> None:
    good, _ = RECORDS[format]
    path = jsonl(good[0], record)
    with pytest.raises(InputError, match=message) as caught:
        list(read_chat([path], RecordFormat(format)))
    assert str(caught.value).startswith(f"{path}:2: ")


def test_sharegpt_calls_of_tools(jsonl: Callable[..., str]) -> None:
    record = said(
        ("human", "the fox"),
        ("function_call", json.dumps(CALL)),
        ("observation", "5"),
        ("gpt", "yes"),
        tools=json.dumps([TOOL]),
    )
    (example,) = read_chat([jsonl(record)], RecordFormat("sharegpt"))
    calls = [{"type": "function", "function": CALL}]
    calling = turn("assistant", "", tool_calls=calls)
    assert example.messages == [USER, calling, turn("tool", "5"), ANSWER]
    assert example.tools == [TOOL]


@pytest.mark.parametrize("key", ["mask", "train", "training", "weight", "loss"])
def test_masks_as_other_tools_name_them(key: str, jsonl: Callable[..., str]) -> None:
    chat = [USER, ANSWER | {key: 0}, *SECOND[:1], SECOND[1] | {key: True}]
    (example,) = read_chat([jsonl({"messages": chat})])
    assert [message.get("mask") for message in example.messages] == [None, False, None, True]
    for value, message in ((0.5, "is 0.5; expected true or false"), ("no", 'is "no"; expected')):
        with pytest.raises(InputError, match=rf"messages\[1\]\.{key}: {message}"):
            list(read_chat([jsonl({"messages": [USER, ANSWER | {key: value}]})]))
    with pytest.raises(InputError, match=rf"messages\[0\]\.{key}: is true on a user message"):
        list(read_chat([jsonl({"messages": [USER | {key: True}, ANSWER]})]))


def test_masks_that_differ_are_refused(jsonl: Callable[..., str]) -> None:
    with pytest.raises(InputError, match=r"messages\[1\]: train and weight say different things"):
        list(read_chat([jsonl({"messages": [USER, ANSWER | {"train": True, "weight": 0}]})]))


def span(begin: Any, end: Any, train: Any = True) -> dict[str, Any]:
    return {"begin_offset": begin, "end_offset": end, "train": train}


TEXT = "I'm doing very well, thank you!"
DETAIL = [span(0, 8, False), span(9, 18), span(19, 30, False)]


def test_spans_are_learned_with_the_end_of_the_turn(tokenizer: Tokenizer) -> None:
    """The example of Axolotl's documentation."""
    for spans, expected in (
        ([(9, 19)], " very well<eos>"),
        ([(0, 3), (21, 26)], "I'mthank<eos>"),  # spaces are tokens of their own here
    ):
        chat = [USER, turn("assistant", TEXT, spans=spans)]
        (found,) = tokenizer.encode_chat(chat)
        whole = tokenizer.encode_chat([USER, turn("assistant", TEXT)])
        assert found.tokens == whole[0].tokens
        learned = [t for t, flag in zip(found.tokens, found.learn, strict=True) if flag]
        assert tokenizer.decode(learned, skip_special_tokens=False) == expected


def test_spans_of_records(jsonl: Callable[..., str]) -> None:
    answer = turn("assistant", TEXT, train_detail=DETAIL)
    unlearned = turn("assistant", TEXT, train_detail=DETAIL[:1])
    masked = answer | {"train": False}
    (example,) = read_chat([jsonl({"messages": [USER, answer, USER, unlearned, USER, masked]})])
    first, second, third = example.messages[1::2]
    assert first == turn("assistant", TEXT, spans=[(9, 19)])
    assert second == third == turn("assistant", TEXT, mask=False)
    for wrong in (
        [span(0, 31)],
        [span(3, 2)],
        [span(-1, 2)],
        [span(0, True)],
        [span(0, 2, "yes")],
        [{"begin_offset": 0, "train": True}],
        [span(0, 2) | {"weight": 2}],
    ):
        with pytest.raises(InputError, match=r"messages\[1\]\.train_detail\[0\]: is .*31 charact"):
            list(read_chat([jsonl({"messages": [USER, answer | {"train_detail": wrong}]})]))
    with pytest.raises(InputError, match=r"messages\[0\]\.train_detail: is "):
        list(read_chat([jsonl({"messages": [USER | {"train_detail": DETAIL}, ANSWER]})]))


def test_spans_need_the_content_as_it_is(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.content | replace(' ', '  ') }}{{ eos_token }}{% endfor %}"
    )
    spread = Tokenizer(
        tokenizer._backend, bos_token=None, eos_token="<eos>", chat_template=template
    )
    chat = [USER, turn("assistant", TEXT, spans=[(9, 19)])]
    with pytest.raises(InputError, match=r"messages\[1\]\.train_detail: the chat template does"):
        spread.encode_chat(chat)
