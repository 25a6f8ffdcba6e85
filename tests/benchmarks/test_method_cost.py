"""The benchmark of what methods cost, on the tiny model."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from esft_jax.config import EvaluationConfig, RunConfig, TrainConfig, save_config
from esft_jax.data_config import DataConfig
from esft_jax.selection_config import ScoreConfig


@pytest.mark.slow
def test_methods_take_turns(
    script: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    base: Path,
    chats: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunConfig(
        model=str(base),
        output="replaced",
        dtype="float32",
        data=DataConfig(train=(str(chats),), valid=(str(chats),), sequence_length=64),
        score=ScoreConfig(samples=8, sequence_length=64, batch_size=8),
        train=TrainConfig(batch_size=8),
        evaluation=EvaluationConfig(data=str(chats)),
    )
    save_config(run, tmp_path / "run.yaml")
    sweep = {
        "output": str(tmp_path / "sweep"),
        "run": str(tmp_path / "run.yaml"),
        "tasks": {"one": [], "two": []},
        "methods": {"full": ["method=full"], "esft": ["select.top_k=1"]},
        "learning_rates": {"esft": [0.1, 0.2]},
    }
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    module, turns = script("method_cost"), []

    def call(name: str, function: str, **arguments: Any) -> Any:
        turns.append(arguments["method"])
        return getattr(script(name), function)(**arguments)

    monkeypatch.setattr(module, "in_new_process", call)
    arguments = ["--config", tmp_path / "sweep.yaml", "--output", tmp_path / "cost.json"]
    module.main([str(a) for a in [*arguments, "--rounds", 2, "--steps", 2]])
    assert turns == ["full", "esft", "full", "esft"]
    figures = json.loads((tmp_path / "cost.json").read_text())["figures"]
    full, esft = figures["full"], figures["esft"]
    assert full["trained_share"] == 1 and 0 < esft["trained_share"] < 0.5
    assert 0 < esft["stored_bytes"] < 0.5 * full["stored_bytes"]
    assert 0 < esft["step_bytes"] < full["step_bytes"] and esft["step_seconds"] > 0
    assert "| full | 100.0% |" in capsys.readouterr().out
    assert not (tmp_path / "sweep").exists()
