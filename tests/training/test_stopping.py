"""The end of a run whose validation loss falls no longer."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from esft_jax.train_config import EarlyStoppingConfig
from esft_jax.training.hooks import Hook, StepInfo
from esft_jax.training.loop import run_training
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.setup import open_setup
from esft_jax.training.stopping import EarlyStopping


@pytest.mark.parametrize(
    ("patience", "min_delta", "losses", "stops"),
    [
        (2, 0.0, [5, 4, 4, 3, 3, 3], 6),  # an equal one is not lower
        (2, 0.0, [5, 6, 7], 3),
        (1, 0.5, [5, 4.6, 4.5], 2),  # lower, but by less than that
        (2, 0.5, [5, 4.6, 4.4, 4.3, 4.2], 5),  # against the last that counted
        (3, 0.0, [5, 4, 3, 2, 1, 2, 2], None),
        (None, 0.0, [5] * 9, None),
    ],
)
def test_when_it_is_due(patience, min_delta, losses, stops) -> None:
    config = EarlyStoppingConfig(patience, min_delta)
    stopping, found = EarlyStopping(config), None
    for number, loss in enumerate(losses, 1):
        # Each is seen after a restart.
        position, stopping = json.loads(json.dumps(stopping.position())), EarlyStopping(config)
        stopping.restore(position)
        stopping.see(float(loss))
        if stopping.due and found is None:
            found = number
    assert found == stops


def test_a_run_stops_early_where_it_would_have_without_an_interruption(
    make_config, tmp_path: Path
) -> None:
    (tmp_path / "cfg.json").write_text(json.dumps({"experts": {"1": [0]}}))
    train = {
        "steps": 9,
        "batch_size": 4,
        "eval_every": 1,
        "save_every": 1,
        "log_every": 4,
        "keep_checkpoints": 1,
        # No loss falls so far: two evaluations after that of step 0 end the run.
        "early_stopping": {"patience": 2, "min_delta": 10.0},
    }
    given = {"expert_cfg": str(tmp_path / "cfg.json"), "mesh": {"data": 1}, "train": train}
    config = make_config(**given)
    said: list[str] = []
    result = run_training(open_setup(config), said.append)
    folder = RunFolder(config.output)
    assert result.result is not None and folder.last_step() == 2
    end = "no lower validation loss in 2 evaluations; the run ends at step 2 of 9"
    assert f"early stopping: {end}" in said
    assert [path.name for path in folder.last.iterdir()] == ["2"]  # the one that is kept
    lines = list(folder.logged())
    assert [line["step"] for line in lines if "valid/loss" in line] == [0, 1, 2]
    assert [line["step"] for line in lines if "train/loss" in line] == [2]  # of both updates

    def fail(done: StepInfo) -> None:
        raise ZeroDivisionError

    again = dataclasses.replace(config, output=str(tmp_path / "again"))
    with pytest.raises(ZeroDivisionError):
        run_training(open_setup(again), said.append, hooks=[Hook(fail)])
    assert run_training(open_setup(again), said.append).step == result.step
    assert "continues from step 1 of 9" in said
    assert RunFolder(again.output).last_step() == 2
    files = (Path(c.output, "adapter", "model.safetensors") for c in (config, again))
    one, other = map(load_file, files)
    for name, tensor in one.items():
        np.testing.assert_array_equal(other[name], tensor, name)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"early_stopping": {"min_delta": 0.1}}, "early_stopping.min_delta: patience is not set"),
        ({"early_stopping": {"patience": 2}}, "early_stopping.patience: needs data.valid"),
    ],
)
def test_what_stops_nothing_is_refused(make_config, changes: dict, problem: str) -> None:
    data = make_config().data.__dict__ | {"valid": ()}
    with pytest.raises(ValueError, match=f"train.{problem}"):
        make_config(data=data, train=changes)
