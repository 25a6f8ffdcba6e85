import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from esft_jax.data.records import expand, read_records, size_of, source_sha256
from esft_jax.errors import InputError

ROWS = [{"text": 'a "b", c\nd'}, {"text": "ü"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


# The same rows in each kind of file, and the numbers of their places.
KINDS: dict[str, tuple[bytes, list[int]]] = {
    ".jsonl": (LINES, [1, 2]),
    ".ndjson": (b"\n" + LINES, [2, 3]),
    ".json": (json.dumps(ROWS, indent=2).encode(), [1, 2]),
    ".csv": ('\ufefftext\n"a ""b"", c\nd"\n\nü\n'.encode(), [2, 5]),
    ".tsv": ('text\tlabel\n"a ""b"", c\nd"\t\nü\t\n'.encode(), [2, 4]),
    ".parquet": (parquet(ROWS), [1, 2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_files_compressed_or_not(kind: str, tmp_path: Path) -> None:
    content, numbers = KINDS[kind]
    compressed = {
        "": content,
        ".gz": gzip.compress(content),
        ".ZST": pa.compress(content, "zstd", True),
    }
    for suffix, stored in compressed.items():
        path = tmp_path / f"data{kind}{suffix}"
        path.write_bytes(stored if isinstance(stored, bytes) else stored.to_pybytes())
        found = list(read_records([str(path)]))
        assert [where for where, _ in found] == [f"{path}:{number}" for number in numbers]
        assert [record["text"] for _, record in found] == [row["text"] for row in ROWS]
        read: list[int] = []
        list(read_records([str(path)], read.append))
        assert min(read) > 0 and 0 < sum(read) <= size_of(str(path))


def test_a_json_file_of_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(LINES)
    assert [record for _, record in read_records([str(tmp_path / "a.json")])] == ROWS


def test_compressed_files_of_several_parts(tmp_path: Path) -> None:
    half = LINES.index(b"\n") + 1
    parts = (LINES[:half], LINES[half:])
    compressed = {
        ".gz": map(gzip.compress, parts),
        ".zst": (pa.compress(part, "zstd", asbytes=True) for part in parts),
    }
    for suffix, stored in compressed.items():
        path = tmp_path / f"a.jsonl{suffix}"
        path.write_bytes(b"".join(stored))
        assert len(list(read_records([str(path)]))) == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"[1]", r":1: is 1; expected a JSON object"),
        ("a.json", b'[{"text": "a"}, {"text": ]', r":2: not valid JSON"),
        ("a.json", b'[{"a": 1, "a": 2}]', r":1: key 'a' appears twice"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', r":1: not valid JSON: expected a comma"),
        ("a.json", b'[{"text": "a"},]', r":2: not valid JSON"),
        ("a.json", b'[{"text": "a"}', r":1: not valid JSON: expected a comma after it, or the"),
        ("a.json", b'[{"text": "a"}] [', r": '\[' after the list"),
        ("a.json", b'{"data": [\n]}', r":1: not valid JSON"),
        ("a.json", b'"text"', r": expected a list of JSON objects"),
        ("a.json", b" [ ] ", r": holds no examples"),
        ("a.json", b'["\xff"]', r": byte 2 is not UTF-8"),
        ("a.csv", b"text,label\na,b\nc\n", r":3: has 1 values; expected 2"),
        ("a.csv", b"text,text\na,b\n", r": column 'text' appears twice"),
        ("a.csv", b'text\n"a\n', r":2: not valid CSV"),
        ("a.csv", b"text\n\xff\n", r": from line \d on: not UTF-8"),
        ("a.csv", b"text\n", r": holds no examples"),
        ("a.jsonl.gz", gzip.compress(LINES)[:-9], r": cannot be read: .*"),
        ("a.jsonl.zst", b"junk", r": cannot be read: .*"),
        ("a.jsonl.gz", b"", r": holds no examples"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), r": cannot be read as Parquet"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", r": is a git-lfs pointer"),
        ("a.arrow", b"", r": unknown kind of file '.arrow'; .*to_parquet"),
        ("a.jsonl.bz2", b"", r": unknown kind of file '.bz2'; .*expected it as .gz or .zst, or"),
        ("a.txt", b"", r": unknown kind of file '.txt'; .*{\"text\": ...}"),
        ("a.gz", b"", r": unknown kind of file ''; expected .jsonl, "),
        ("a", b"", r": unknown kind of file ''; .*what has a record in each line"),
    ],
)
def test_a_wrong_file_is_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        list(read_records([str(tmp_path / name)]))
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_long_values_of_csv(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000 + "\n")
    ((_, record),) = read_records([str(tmp_path / "a.csv")])
    assert len(record["text"]) == 200_000


def test_folders_and_patterns(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "a.txt", ".hidden.jsonl", "sub/c.jsonl", "other/d.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(LINES) if name.endswith(".gz") else LINES)
    top = [str(tmp_path / name) for name in ("a.jsonl.gz", "b.jsonl")]
    assert expand([str(tmp_path)]) == top
    assert expand([f"{tmp_path}/[ab].jsonl*"]) == top
    assert expand([f"{tmp_path}/**/*.jsonl"]) == [top[1], str(tmp_path / "sub/c.jsonl")]
    wheres = [where for where, _ in read_records([str(tmp_path)])]
    assert wheres == [f"{path}:{number}" for path in top for number in (1, 2)]
    with pytest.raises(InputError, match=r"x\*: no file has a name of this pattern"):
        expand([f"{tmp_path}/x*"])
    (tmp_path / "z.csv").write_text("text\na\n")
    with pytest.raises(InputError, match=r"several kinds \(\.csv, \.jsonl\).*\*\.csv"):
        expand([str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is a folder without files to read"):
        expand([str(tmp_path / "empty")])


def test_a_file_with_a_name_like_a_pattern(tmp_path: Path) -> None:
    for name in ("part[1].jsonl", "part1.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    assert expand([f"{tmp_path}/part[1].jsonl"]) == [f"{tmp_path}/part[1].jsonl"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the hub is asked for; it has two rows of everything."""
    asked: list[tuple[Any, ...]] = []

    def load_dataset(name: str, configuration: Any, *, split: str, revision: Any) -> Any:
        asked.append((name, configuration, split, revision))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("owner/name", ("owner/name", None, "train", None)),
        ("owner/name:dev", ("owner/name", None, "dev", None)),
        ("owner/name:train[:10%]", ("owner/name", None, "train[:10%]", None)),
        ("owner/name:train+test", ("owner/name", None, "train+test", None)),
        ("owner/na.me/main:test@e53f048", ("owner/na.me", "main", "test", "e53f048")),
        ("o/n@refs/convert/parquet", ("o/n", None, "train", "refs/convert/parquet")),
    ],
)
def test_hub_names(name: str, expected: tuple[Any, ...], hub: list[tuple[Any, ...]]) -> None:
    assert list(read_records([name])) == [(f"{name}:{n}", row) for n, row in enumerate(ROWS, 1)]
    assert hub == [expected]
    assert source_sha256(name) == source_sha256("owner/name:dev")
    assert 0 < size_of(name) < 1000


def test_hub_failure_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"owner/name: neither a local file .*: no network$"):
        list(read_records(["owner/name"]))


def test_what_is_here_is_not_asked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: list[tuple[Any, ...]]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    with pytest.raises(InputError, match="owner/name: is a folder without files to read"):
        list(read_records(["owner/name"]))
    with pytest.raises(InputError, match="owner/name:dev: owner/name is here, too"):
        list(read_records(["owner/name:dev"]))
    for name in ("json", "./name", "../name:train", "owner/missing.json.gz"):
        with pytest.raises(InputError, match="cannot be read: No such file"):
            list(read_records([name]))
    assert hub == []


@pytest.mark.parametrize("name", ["pipe.json", "pipe.csv.gz"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: is no regular file"):
        list(read_records([str(tmp_path / name)]))
