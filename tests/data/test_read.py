import hashlib
import json
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esft_jax.data.read import read_chat, read_text
from esft_jax.data.records import source_sha256
from esft_jax.errors import InputError

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}
GOOD = {"id": 7, "messages": [USER, ANSWER], "length": 3}


def messages(*turns: Any) -> dict[str, Any]:
    return {"messages": list(turns)}


def test_chat_records(jsonl: Callable[..., str]) -> None:
    masked = messages(USER, ANSWER | {"mask": 0}, USER, ANSWER | {"mask": 1})
    path = jsonl(GOOD, "", masked)
    first, second = read_chat([path])
    assert first.messages == [USER, ANSWER]
    assert (first.where, second.where) == (f"{path}:1", f"{path}:3")
    assert second.messages[1] == ANSWER | {"mask": False}
    assert second.messages[3] == ANSWER | {"mask": True}


def test_text_records_of_several_files(jsonl: Callable[..., str]) -> None:
    paths = [jsonl({"text": "a"}, {"text": ""}, name="a.jsonl"), jsonl({"text": "ü"})]
    assert [example.text for example in read_text(paths)] == ["a", "", "ü"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ('{"messages": [', "not valid JSON"),
        (b'{"messages": "\xff"}', "not UTF-8"),
        ('{"messages": [], "messages": []}', "'messages' appears twice"),
        ([], "is \\[\\]; expected a JSON object"),
        ({"text": "x"}, "messages: missing"),
        (messages(), "messages: is \\[\\]"),
        (messages("hi", ANSWER), 'messages\\[0\\]: is "hi"; expected an object'),
        (messages(USER, {"content": "yes"}), "messages\\[1\\].role: missing"),
        (messages(USER, {"role": "assistant"}), "messages\\[1\\].content: missing"),
        (messages(USER, ANSWER | {"role": "bot"}), 'messages\\[1\\].role: is "bot"; expected one'),
        (messages(USER, ANSWER | {"role": []}), "messages\\[1\\].role: is \\[\\]"),
        (messages(USER | {"content": 5}, ANSWER), "messages\\[0\\].content: is 5; expected a str"),
        (messages(USER | {"content": None}, ANSWER), "messages\\[0\\].content: is null"),
        (messages(USER | {"content": "\ud800"}, ANSWER), "content: half of a surrogate pair"),
        (messages(USER, ANSWER | {"mask": "no"}), 'messages\\[1\\].mask: is "no"'),
        (messages(USER | {"mask": True}, ANSWER), "messages\\[0\\].mask: is true on a user"),
        (messages(USER), "no target"),
        (messages(USER, ANSWER | {"mask": False}), "no target"),
    ],
)
def test_bad_chat_record(jsonl: Callable[..., str], record: Any, message: str) -> None:
    path = jsonl(GOOD, record, GOOD)
    with pytest.raises(InputError, match=message) as caught:
        list(read_chat([path]))
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("function_call", {"name": "f"}, "expected calls as tool_calls of an assistant message"),
        ("tool_call_id", "7", "expected calls as tool_calls of an assistant message"),
        ("reasoning_details", "hm", "expected one of reasoning_content, thinking, reasoning on"),
        ("trainDetail", {"a": 1}, '"mask": false on an assistant message'),
        ("name", "Bob", "expected role, content, mask, "),
        ("prefix", True, "expected role, content, mask, "),
    ],
)
def test_a_key_of_a_message_that_is_not_read_is_refused(
    jsonl: Callable[..., str], key: str, value: Any, message: str
) -> None:
    for content in ({}, {"content": None}, {"content": ""}, {"content": "yes"}):
        turn = {"role": "assistant", key: value} | content
        path = jsonl(GOOD, messages(USER, turn))
        with pytest.raises(InputError) as caught:
            list(read_chat([path]))
        assert str(caught.value).startswith(f"{path}:2: messages[1].{key}: is ")
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("functions", [{}]),
        ("tool_definitions", [{}]),
        ("pythonTools", ["def f(): ..."]),
        ("parallel_tool_calls", False),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("documents", [{"text": "a"}]),
        ("system", "Be brief."),
        ("systemPrompt", "Be brief."),
        ("prompt", "another question"),
        ("completion", "another answer"),
        ("rejected", [ANSWER]),
        ("rejected_response", "no"),
        ("images", ["a.png"]),
        ("weight", 0.5),
        ("loss_weight", 0),
        ("sample_weights", [1, 0]),
        ("mask", "User"),
        ("loss_mask", [0, 1]),
        ("assistant_masks", [0, 1]),
        ("train_on_turn", [False, True]),
        ("input_ids", [1, 2]),
    ],
)
def test_a_key_of_a_record_that_changes_what_is_learned_is_refused(
    jsonl: Callable[..., str], key: str, value: Any
) -> None:
    path = jsonl(GOOD, GOOD | {key: value})
    with pytest.raises(InputError) as caught:
        list(read_chat([path]))
    assert str(caught.value).startswith(f"{path}:2: {key}: is ")


CALL = {"id": "7", "type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "5", "name": "look", "tool_call_id": "7"}


def test_tools_calls_and_reasoning(jsonl: Callable[..., str]) -> None:
    thought = ANSWER | {"reasoning_content": "hm"}
    chat = messages(USER, CALLING, RESULT, thought)
    without = CALLING | {"content": None}
    path = jsonl(
        chat | {"tools": [TOOL]},
        messages(USER, {"role": "assistant", "tool_calls": json.dumps([CALL])})
        | {"tools": json.dumps([TOOL])},
        messages(USER, without | {"tool_calls": [CALL["function"] | {"arguments": "{}"}]}),
    )
    first, second, third = read_chat([path])
    assert (first.messages, first.tools) == (chat["messages"], [TOOL])
    assert (second.messages, second.tools) == ([USER, CALLING], [TOOL])
    assert third.messages[1]["tool_calls"] == [{"name": "look", "arguments": "{}"}]
    assert third.tools is None


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        (
            CALLING | {"tool_calls": [{}]},
            r"\.tool_calls: is \[{}\]; .*\.tool_calls\[0\]\.name: missing",
        ),
        (CALLING | {"tool_calls": [7]}, r"messages\[1\]\.tool_calls: is \[7\]; expected a list"),
        (CALLING | {"tool_calls": {"a": 1}}, r"messages\[1\]\.tool_calls: is .*; expected a list"),
        (CALLING | {"tool_calls": "[{"}, r"messages\[1\]\.tool_calls: not valid JSON"),
        (CALLING | {"tool_calls": [{"function": 5}]}, r"tool_calls\[0\]\.function\.name: missing"),
        (
            CALLING | {"tool_calls": [{"name": "look", "arguments": [1]}]},
            r"tool_calls\[0\]\.arguments: is \[1\]; expected an object",
        ),
        (
            CALLING | {"tool_calls": [{"name": "look", "arguments": {"a": float("nan")}}]},
            r"messages\[1\]\.tool_calls: is no JSON",
        ),
        (
            CALLING | {"tool_calls": [{"name": "look", "arguments": {"a": "\ud800"}}]},
            r"messages\[1\]\.tool_calls: half of a surrogate pair",
        ),
        (ANSWER | {"reasoning_content": ["hm"]}, r"messages\[1\]\.reasoning_content: is \["),
        (ANSWER | {"content": "", "thinking": "hm"}, r"messages\[1\]\.content: is \"\"; expected"),
        (USER | {"tool_calls": [CALL]}, r"messages\[1\]\.tool_calls: is .*an assistant message"),
        (USER | {"thinking": "hm"}, r"messages\[1\]\.thinking: is .* on an assistant message"),
        (RESULT | {"name": 5}, r"messages\[1\]\.name: is 5; expected a string"),
        (RESULT | {"content": None}, r"messages\[1\]\.content: is null"),
    ],
)
def test_bad_calls_and_thoughts(
    jsonl: Callable[..., str], turn: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        list(read_chat([jsonl(messages(USER, turn, ANSWER))]))


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"type": "function"}], r"tools\[0\]\.name: missing; expected"),
        ([{"function": {"name": " "}}], r"tools\[0\]\.function\.name: is \" \"; expected"),
        (["look"], r"tools: is \[\"look\"\]; expected a list of tools: objects"),
        ("look", "tools: not valid JSON"),
    ],
)
def test_bad_tools(jsonl: Callable[..., str], tools: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_chat([jsonl(GOOD | {"tools": tools})]))


def test_keys_that_other_rows_have_are_not_there(tmp_path: Path) -> None:
    """A table's structs have the keys of all rows."""
    path = str(tmp_path / "data.parquet")
    other = {"function": {"name": "go", "arguments": {"to": "y"}}}
    rows = [
        messages(USER, CALLING, RESULT, ANSWER),
        messages(USER, {**CALLING, "tool_calls": [other]}),
    ]
    datasets.Dataset.from_list(rows).to_parquet(path)
    assert [example.messages for example in read_chat([path])] == [r["messages"] for r in rows]


def test_keys_that_change_nothing_are_free(jsonl: Callable[..., str]) -> None:
    free = {"source": "x", "label": 3, "score": 0.5, "text": "hi yes", "net_weight": 2, "meta": {}}
    nothing = {
        "tools": None,
        "images": [],
        "system": "",
        "chat_template_kwargs": {"thinking": None, "xml_tools": [], "custom_instructions": ""},
        "functions": "[]",
        "documents": " null",
    }
    said = {"prompt": "hi", "completion": "yes\n"}
    turns = [USER | {"name": None}, ANSWER | {"tool_calls": [], "reasoning_content": None}]
    path = jsonl(GOOD | free | nothing | said | {"messages": turns})
    assert next(read_chat([path])).messages == [USER, ANSWER]
    free |= {"prompt": "a", "tools": ["hammer"], "system": "Linux"}
    assert next(read_text([jsonl(free)])).text == "hi yes"
    with pytest.raises(InputError, match="weight: is 2; all records count alike"):
        next(read_text([jsonl(free | {"weight": 2})]))


@pytest.mark.parametrize("content", ["", " \n"])
def test_an_empty_answer_is_refused_unless_it_is_masked(
    jsonl: Callable[..., str], content: str
) -> None:
    empty = ANSWER | {"content": content}
    with pytest.raises(InputError, match=r"messages\[1\]\.content: is .*; expected an answer"):
        list(read_chat([jsonl(messages(USER, empty, USER, ANSWER))]))
    masked = messages(USER, empty | {"mask": False}, USER, ANSWER)
    assert next(read_chat([jsonl(masked)])).messages[1]["mask"] is False


@pytest.mark.parametrize(
    ("turn", "message"),
    [
        ({"from": "human", "value": "hi"}, "role: missing; .*ShareGPT's from and value"),
        ({"role": "gpt", "content": "yes"}, "expected one of .*; assistant perhaps"),
        ({"role": "Assistant", "content": "yes"}, "expected one of .*; assistant perhaps"),
        ({"role": "developer", "content": "yes"}, "expected one of .*; system perhaps"),
        ({"role": "function", "content": "5"}, "expected one of .*; tool perhaps"),
        (ANSWER | {"content": [{"type": "text", "text": "a"}]}, "parts are not read"),
        (ANSWER | {"\u2028\ud800": 1}, r"messages\[1\]\.\\u2028\\ud800: is 1"),
    ],
)
def test_messages_of_other_tools(jsonl: Callable[..., str], turn: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        list(read_chat([jsonl(messages(USER, turn))]))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "a"}, "messages: missing.*format: text reads"),
        ({"messages": None, "text": "a"}, "messages: missing.*format: text reads"),
        ({"prompt": "a", "raw_answers": ["b"], "answers": None}, "evaluation.data reads"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "format: sharegpt reads with"),
        ({"conversation_id": "c", "conversation": [USER, ANSWER]}, "columns: {messages: convers"),
        ({"message_id": "c", "parent_id": "b", "text": "a"}, "a message of a tree"),
        ({"instruction": "a", "input": "", "output": "b"}, "format: alpaca reads"),
        ({"instruction": "a", "context": "", "response": "b"}, "{question: instruction, answer: r"),
        ({"prompt": "a", "completion": "b"}, "format: prompt_completion reads"),
        ({"question": "a", "answer": "b"}, "format: question_answer reads"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "a preference"),
        ({"input_ids": [1], "labels": [1]}, "token ids; expected text"),
        ({"chat": [], "n": 1}, "its keys are chat, n"),
        ({"messages": None, "id": 1}, "its keys are id$"),
        ({"messages": None}, "all its keys are null"),
        ({}, "the record is empty"),
    ],
)
def test_layouts_of_other_tools(jsonl: Callable[..., str], record: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(read_chat([jsonl(record)]))


def test_chats_given_as_text(jsonl: Callable[..., str]) -> None:
    with pytest.raises(InputError, match=r"text: missing; .*format: messages reads"):
        list(read_text([jsonl(GOOD)]))


@pytest.mark.parametrize(
    ("record", "message"),
    [(GOOD, "text: missing"), ({"text": ["x"]}, 'text: is \\["x"\\]; expected a string')],
)
def test_bad_text_record(jsonl: Callable[..., str], record: Any, message: str) -> None:
    path = jsonl({"text": "a"}, record)
    with pytest.raises(InputError, match=message) as caught:
        list(read_text([path]))
    assert str(caught.value).startswith(f"{path}:2: ")


@pytest.mark.parametrize("records", [[], ["", "  "]])
def test_empty_file(jsonl: Callable[..., str], records: list[str]) -> None:
    path = jsonl(*records)
    with pytest.raises(InputError, match="holds no examples") as caught:
        list(read_chat([jsonl(GOOD, name="good.jsonl"), path]))
    assert str(caught.value).startswith(path)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "no/such/file/here"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: cannot be read: No such file"):
        list(read_text([str(tmp_path / name)]))


@pytest.mark.parametrize("name", ["pipe.jsonl", "pipe.parquet", "pipe"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    for read in (lambda path: list(read_text([path])), source_sha256):
        with pytest.raises(InputError, match=f"{name}: is no regular file"):
            read(str(tmp_path / name))


def test_a_byte_order_mark(jsonl: Callable[..., str]) -> None:
    path = jsonl(b'\xef\xbb\xbf{"text": "a"}', {"text": "b"})
    assert [example.text for example in read_text([path])] == ["a", "b"]


def test_parquet(tmp_path: Path) -> None:
    path = str(tmp_path / "data.parquet")
    rows = [GOOD, messages(USER, ANSWER | {"mask": False}, USER, ANSWER)]
    datasets.Dataset.from_list(rows).to_parquet(path)
    first, second = read_chat([path])
    assert first.messages == [USER, ANSWER]
    assert second.messages == [USER, ANSWER | {"mask": False}, USER, ANSWER]
    assert second.where == f"{path}:2"
    (tmp_path / "broken.parquet").write_bytes(Path(path).read_bytes()[:100])
    with pytest.raises(InputError, match=r"broken\.parquet: cannot be read as Parquet"):
        list(read_chat([str(tmp_path / "broken.parquet")]))


def test_the_parquet_file_that_is_named_is_read(tmp_path: Path) -> None:
    names = ["part[1].parquet", "part1.parquet", "part*.parquet", "a=1.PARQUET", "file:%20.parquet"]
    for name in names:
        pq.write_table(pa.table({"text": [name]}), tmp_path / name)
    for name in names:
        assert [example.text for example in read_text([str(tmp_path / name)])] == [name]


def test_parquet_without_rows(tmp_path: Path) -> None:
    path = str(tmp_path / "empty.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), path)
    with pytest.raises(InputError, match=r"empty\.parquet: holds no examples"):
        list(read_text([path]))


def test_parquet_columns_of_any_type(tmp_path: Path) -> None:
    path = str(tmp_path / "data.parquet")
    table = {
        "text": pa.array(["a"], pa.large_string()),
        "time": pa.array([1], pa.timestamp("us", "Europe/Berlin")),
        "nanoseconds": pa.array([10**18 + 1], pa.timestamp("ns")),
        "price": pa.array([Decimal("1.5")]),
        "bytes": pa.array([b"\xff"]),
        "map": pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int8())),
        "kind": pa.array(["x"]).dictionary_encode(),
    }
    pq.write_table(pa.table(table), path)
    assert [example.text for example in read_text([path])] == ["a"]
    for name, column in {"weight": pa.array([b"\xff"]), "text": pa.array([b"\xff"])}.items():
        pq.write_table(pa.table(table | {name: column}), path)
        with pytest.raises(InputError, match=f"data.parquet:1: {name}: is "):
            list(read_text([path]))
    for bad in (
        pa.array([2**62], pa.timestamp("us")),
        pa.array([1], pa.timestamp("us", "no/where")),
    ):
        pq.write_table(pa.table(table | {"late": bad}), path)
        with pytest.raises(InputError, match=r"data\.parquet: column 'late' \(timestamp"):
            list(read_text([path]))
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text", "text"]), path)
    with pytest.raises(InputError, match=r"data\.parquet: column 'text' appears twice"):
        list(read_text([path]))


def test_json_in_parquet_is_parsed(tmp_path: Path) -> None:
    features = datasets.Features(
        {"messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Json()})}
    )
    path = str(tmp_path / "data.parquet")
    datasets.Dataset.from_list([messages(USER, ANSWER)], features=features).to_parquet(path)
    assert next(read_chat([path])).messages == [USER, ANSWER]


def test_hash_is_of_the_whole_file(jsonl: Callable[..., str]) -> None:
    path = jsonl({"text": "a"}, {"text": "b"})
    content = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in "ab")
    assert source_sha256(path) == hashlib.sha256(content).hexdigest()
