"""The benchmark of input and checkpoints, on the tiny model."""

import itertools
import json

import pytest

from esft_jax.config import RunConfig, save_config
from esft_jax.data_config import DataConfig
from esft_jax.selection_config import ScoreConfig


@pytest.fixture
def benchmark(script):
    return script("input_overlap")


class Numbers:
    """An iterator with the methods of that of the training data."""

    get_state = set_state = close = None

    def __init__(self):
        self.numbers = itertools.count()

    def __next__(self):
        return next(self.numbers)


def test_every_third_turn_repeats_the_last_batch(benchmark):
    turns = benchmark.Turns(Numbers(), 2)
    assert [next(turns) for _ in range(8)] == [0, 1, 2, 3, 3, 3, 4, 5]
    assert len(turns.waited) == 8


def test_ratios_are_taken_within_a_cycle(benchmark):
    saved, real, constant = benchmark.TURNS
    seconds = {saved: [1.5, 3.0, 8.0], real: [1.0, 2.5, 4.0], constant: [1.0, 2.0, 5.0]}
    waited = {turn: [0.1, 0.1, 0.1] for turn in benchmark.TURNS}
    measured = {"seconds": seconds, "waited": waited, "blocked": [0.1, 0.3, 0.2]}
    found = benchmark.summary(measured, steps=10)
    assert found["turns"][real] == pytest.approx(
        {"step_seconds": 2.5, "of_constant": 1.0, "waiting_share": 0.04}
    )
    assert found["save_blocks_seconds"] == 0.2
    assert found["save_costs_seconds"] == pytest.approx(5.0)


def test_a_run(benchmark, base, chats, tmp_path, capsys):
    config = RunConfig(
        model=str(base),
        output="replaced",
        dtype="float32",
        data=DataConfig(train=(str(chats),), valid=(str(chats),), sequence_length=64),
        score=ScoreConfig(samples=8, sequence_length=64, batch_size=8),
    )
    save_config(config, tmp_path / "config.yaml")
    output = tmp_path / "report.json"
    arguments = ["--config", tmp_path / "config.yaml", "--output", output, "--rounds", 2]
    benchmark.main([str(a) for a in [*arguments, "--steps", 2, "train.batch_size=8"]])
    report = json.loads(output.read_text())
    for name in ("seconds", "waited"):
        turns = report["measured"][name]
        assert set(turns) == set(benchmark.TURNS)
        assert all(len(v) == 2 and min(v) > 0 for v in turns.values())
    assert len(report["measured"]["blocked"]) == 2
    assert report["checkpoint_bytes"] > 0 and report["before"]["cores"]
    printed = capsys.readouterr().out
    assert all(f"| {turn} |" in printed for turn in benchmark.TURNS)
