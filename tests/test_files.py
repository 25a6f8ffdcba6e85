"""What other processes write, and where one may write."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from esft_jax import files
from esft_jax.errors import InputError


def test_a_file_of_another_host_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    late = tmp_path / "late"
    monkeypatch.setattr(files.time, "sleep", lambda seconds: late.write_text(""))
    assert files.seen(late)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    assert not files.seen(tmp_path / "nowhere" / "file")


def test_an_output_in_a_folder_that_cannot_be_searched(tmp_path: Path, monkeypatch) -> None:
    secret, stat = tmp_path / "secret", os.stat
    secret.mkdir()

    def refusing(path, *arguments, **options):
        if str(path).startswith(f"{secret}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=f"^output: {secret}: no permission to write"):
        files.check_writable(secret / "new" / "run", "output")


@dataclasses.dataclass(frozen=True)
class Part:
    number: int


@dataclasses.dataclass(frozen=True)
class Whole:
    part: Part
    pair: tuple[int, int]
    share: float | None = None


def test_a_parsed_value_becomes_a_dataclass_with_others_in_it() -> None:
    value = {"part": {"number": 1}, "pair": [2, 3], "share": 1}
    assert files.checked(Whole, value, "f") == Whole(Part(1), (2, 3), 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"share": float("nan")}, "f:1: share: is nan; expected a finite number"),
        ({"pair": [float("inf"), 3]}, "f:1: pair.0: is inf; expected a finite number"),
        ({"share": 10**400}, "f:1: share: is 1000.*; expected a finite number"),
        ({"pair": [2, 10**400]}, "f:1: pair.1: is 1000.*; expected a finite number"),
        ({"pair": [2]}, "f:1: pair.1: "),
        ({"part": {"number": "1"}}, "f:1: part.number: is '1'; expected a valid integer"),
        ({"part": {"number": True}}, "f:1: part.number: is True; expected a valid integer"),
        ({"part": {"number": 1, "more": 2}}, "f:1: part.more: is no key that is known here$"),
        ({"part": {}}, "f:1: part.number: is missing$"),
        ({"part": []}, r"f:1: part: is \[\]; expected an object"),
    ],
)
def test_a_value_of_another_type_is_named(changes: dict, message: str) -> None:
    value = {"part": {"number": 1}, "pair": [2, 3]} | changes
    with pytest.raises(InputError, match=message):
        files.checked(Whole, value, "f:1")


def test_nesting_has_an_end() -> None:
    value: list = []
    for _ in range(5000):
        value = [value]
    with pytest.raises(InputError, match="f: nested too deeply"):
        files.checked(list[int], value, "f")


def test_a_growing_file_may_end_within_a_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": 2}\n{"a": \xff')
    assert [v["a"] for _, v in files.read_json_lines(path, growing=True)] == [1, 2]
    with pytest.raises(InputError, match=r"lines.jsonl:4: byte 6 of the line is not UTF-8"):
        list(files.read_json_lines(path))
    path.write_text(json.dumps({"a": 1}) + "\n{\n")
    with pytest.raises(InputError, match=r"lines.jsonl:2: not valid JSON"):
        list(files.read_json_lines(path, growing=True))


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(InputError, match="pipe: is no regular file"):
        files.write_text_atomic(path, "text")
    assert path.is_fifo()
