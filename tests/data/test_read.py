import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from esft_jax.data.read import read_chat, read_text, source_sha256
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
        ('{"messages": [', "broken JSON"),
        (b'{"messages": "\xff"}', "not UTF-8"),
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


@pytest.mark.parametrize("name", ["missing.jsonl", "missing.parquet", "no/such/file"])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=f"{name}: no such file"):
        list(read_text([str(tmp_path / name)]))


def test_unsupported_source(tmp_path: Path, jsonl: Callable[..., str]) -> None:
    with pytest.raises(InputError, match="is a folder"):
        list(read_text([str(tmp_path)]))
    with pytest.raises(InputError, match=r"unknown kind of file '\.csv'"):
        list(read_text([jsonl("a,b", name="data.csv")]))


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


def test_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"text": "a"}, {"text": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match="owner/name:dev:2: text: is null"):
        list(read_text(["owner/name:dev"]))
    assert next(read_text(["owner/name"])).text == "a"
    assert asked == [("owner/name", "dev"), ("owner/name", "train")]
    assert source_sha256("owner/name") == source_sha256("owner/name:dev")


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(name: str, split: str) -> datasets.Dataset:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"owner/name: neither a local file .*: no network$"):
        list(read_text(["owner/name"]))


def test_hash_is_of_the_whole_file(jsonl: Callable[..., str]) -> None:
    path = jsonl({"text": "a"}, {"text": "b"})
    content = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in "ab")
    assert source_sha256(path) == hashlib.sha256(content).hexdigest()
