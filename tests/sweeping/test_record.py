"""Finished cells are kept, whatever a kill does to the last line."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from esft_jax.errors import InputError
from esft_jax.sweeping.config import BASE, Cell
from esft_jax.sweeping.record import CellResult, Record

ONE = CellResult(Cell("intent", "full", 1e-5, 3), "a", "intent", 12.5, 0.75, {"python": 1.5})
BASE_CELL = Cell("intent", BASE, None, 3)
TWO = CellResult(Cell("intent", "token", None, 3), "b", "intent", 50.0, 0.25, experts=7)


def test_results_come_back(tmp_path: Path) -> None:
    record = Record(tmp_path / "sweep" / "results.jsonl")
    assert record.find(ONE.cell, "a") is None
    record.add(ONE)
    record.add(TWO)
    again = Record(record.path)
    assert again.results == {ONE.cell: ONE, TWO.cell: TWO}
    assert again.find(ONE.cell, "a") == ONE


def test_half_a_line_is_a_cell_that_is_not_finished(tmp_path: Path) -> None:
    record = Record(tmp_path / "results.jsonl")
    record.add(ONE)
    record.add(TWO)
    content = record.path.read_bytes()
    first = content.index(b"\n") + 1
    for end in (first, first + 1, len(content) - 1):
        record.path.write_bytes(content[:end])
        cut = Record(record.path)
        assert list(cut.results) == [ONE.cell]
        cut.add(TWO)
        assert record.path.read_bytes() == content


def test_what_others_finish_is_seen(tmp_path: Path) -> None:
    """Lines of several processes; reading cuts nothing off, since it may be just being written."""
    ours, theirs = (Record(tmp_path / "results.jsonl") for _ in range(2))
    theirs.add(ONE)
    ours.refresh()
    assert ours.results == {ONE.cell: ONE}
    ours.add(TWO)
    content = ours.path.read_bytes()
    ours.path.write_bytes(content[:-1])
    theirs.refresh()
    assert theirs.results == {ONE.cell: ONE}
    assert ours.path.read_bytes() == content[:-1]


def test_other_settings_are_refused(tmp_path: Path) -> None:
    record = Record(tmp_path / "results.jsonl")
    record.add(ONE)
    with pytest.raises(InputError, match=r"intent/full/lr-1e-05/seed-3 was run with other"):
        record.find(ONE.cell, "other")


@pytest.mark.parametrize("line", ["{", "[]", '{"cell": {}}', '{"cell": 3}', "5", '"\xff"'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "results.jsonl"
    Record(path).add(ONE)
    path.write_bytes(path.read_bytes() + line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match=r"results.jsonl:2: "):
        Record(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": math.nan}, "value: is nan; expected a finite number"),
        ({"valid_loss": math.inf}, "valid_loss: is inf"),
        ({"retention": {"python": math.nan}}, "retention.python: is nan"),
        ({"value": "12.5"}, "value: is '12.5'"),
        ({"value": None}, "value is None and valid_loss 0.75"),
        (
            {"cell": dataclasses.asdict(BASE_CELL), "value": None, "valid_loss": None},
            "value is None; expected a number for the base",
        ),
        ({"trained": 10**400}, "trained: is 1000"),
        ({"trained": 0.5}, "trained: is 0.5"),
        ({"retention": []}, "retention: is "),
        ({"more": 1}, "more: is no key that is known here"),
        (
            {"cell": dataclasses.asdict(ONE.cell) | {"seed": "0"}},
            "cell.seed: is",
        ),
    ],
)
def test_a_value_that_no_cell_gives_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    path = tmp_path / "results.jsonl"
    Record(path).add(TWO)
    path.write_text(path.read_text() + json.dumps(dataclasses.asdict(ONE) | changes) + "\n")
    with pytest.raises(InputError, match=f"results.jsonl:2: {message}"):
        Record(path)


def test_a_result_is_plain_json(tmp_path: Path) -> None:
    Record(tmp_path / "r.jsonl").add(dataclasses.replace(ONE, step_bytes=3))
    (line,) = (tmp_path / "r.jsonl").read_text().splitlines()
    assert line.startswith('{"cell": {"task": "intent", "method": "full", "learning_rate": 1e-05')
