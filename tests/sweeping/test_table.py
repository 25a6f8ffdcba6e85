"""Means, spreads and the choice of a learning rate, against figures made by hand."""

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from esft_jax.sweeping.config import BASE, Cell, SweepConfig, load_sweep
from esft_jax.sweeping.record import CellResult, Record
from esft_jax.sweeping.table import Spread, best_learning_rate, summarise, to_csv


@pytest.fixture
def sweep(sweep_file: Path) -> SweepConfig:
    return load_sweep(sweep_file)


def add(
    record: Record,
    task: str,
    method: str,
    rate: float | None,
    seed: int,
    value: float | None,
    loss: float | None,
) -> None:
    trained = {BASE: 0, "token": 20, "full": 100}[method]
    record.add(
        CellResult(
            Cell(task, method, rate, seed),
            "",
            "m",
            value,
            loss,
            retention={} if loss is None else {"a": loss + 1, "b": loss + 2},
            other_values={} if value is None else {"sums": value / 2},
            experts=trained + seed if method == "token" else None,
            trained=trained,
            total=100,
            stored_bytes=4 * trained,
            seconds=10.0 * seed,
        )
    )


@pytest.fixture
def record(tmp_path: Path) -> Record:
    record = Record(tmp_path / "results.jsonl")
    add(record, "intent", BASE, None, 3, 0, 4)
    add(record, "licence", BASE, None, 3, 2, 4)
    for rate, losses in ((1e-5, (0.5, 0.9)), (0.001, (0.8, 0.4))):
        add(record, "intent", "full", rate, 3, 40, losses[0])
        add(record, "licence", "full", rate, 3, 60, losses[1])
    return record


def test_the_learning_rate_with_the_lowest_mean_loss(sweep: SweepConfig, record: Record) -> None:
    assert best_learning_rate(sweep, record, "full") == 0.001


def test_rows_of_what_is_finished(sweep: SweepConfig, record: Record) -> None:
    base, full = summarise(sweep, record)
    assert (base.method, base.average) == (BASE, Spread(1.0, 0.0, 1))
    assert full.values == {"intent": Spread(40.0, 0.0, 1), "licence": Spread(60.0, 0.0, 1)}
    # One task of the second seed: the average waits for the other.
    add(record, "intent", "full", 0.001, 4, 50, 1)
    assert summarise(sweep, record)[1].average == Spread(50.0, 0.0, 1)
    add(record, "licence", "full", 0.001, 4, 64, 1)
    full = summarise(sweep, record)[1]
    assert full.values["intent"].mean == 45
    assert full.values["intent"].deviation == pytest.approx(50**0.5)
    assert full.average.mean == 53.5
    assert full.average.deviation == pytest.approx(24.5**0.5)  # of 50 and 57
    assert full.valid_loss.mean == pytest.approx(0.8)  # of 0.6 and 1
    assert full.retention is not None
    assert full.retention.mean == pytest.approx((0.6 + 1.5 + 1 + 1.5) / 2)
    assert (full.trained_share, full.stored_bytes, full.seconds) == (1.0, 400.0, 35.0)


def test_what_diverged_is_left_out(sweep: SweepConfig, record: Record) -> None:
    # The best losses but for one task: this learning rate is not chosen.
    add(record, "intent", "full", 0.001, 3, None, None)
    assert best_learning_rate(sweep, record, "full") == 1e-5
    add(record, "intent", "full", 1e-5, 4, 42, 1)
    add(record, "licence", "full", 1e-5, 4, None, None)
    assert summarise(sweep, record)[1].average == Spread(50.0, 0.0, 1)
    # Nothing is left of a method of which all learning rates diverged.
    add(record, "licence", "full", 1e-5, 3, None, None)
    assert [row.method for row in summarise(sweep, record)] == [BASE]


def test_the_base_is_that_of_the_sweep_as_it_is_now(sweep: SweepConfig, record: Record) -> None:
    one = replace(sweep, tasks={"licence": sweep.tasks["licence"]})
    base, full = summarise(one, record)
    assert (base.average.mean, full.average.mean) == (2.0, 60.0)
    assert [row.method for row in summarise(replace(sweep, seeds=(4, 3)), record)] == []


def test_csv(sweep: SweepConfig, record: Record) -> None:
    add(record, "intent", "token", None, 3, 30, 1)
    add(record, "licence", "token", None, 3, 50, 1)
    rows = list(csv.DictReader(io.StringIO(to_csv(summarise(sweep, record)))))
    assert [row["method"] for row in rows] == [BASE, "token", "full"]
    assert (rows[1]["average"], rows[1]["trained_share"], rows[1]["seeds"]) == ("40.0", "0.2", "1")
    assert (rows[2]["learning_rate"], rows[2]["licence"]) == ("0.001", "60.0")
    assert (rows[1]["other_sums"], rows[1]["experts"]) == ("20.0", "23.0")  # of 15, 25; 20 + seed
    assert (rows[0]["experts"], rows[2]["experts"]) == ("", "")
    assert (rows[0]["valid_loss"], rows[1]["valid_loss"]) == ("4.0", "1.0")
