"""Runs that have no result, and runs that go on with another number of steps."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from esft_jax.config import load_config
from esft_jax.data.pipeline import PackedDataset
from esft_jax.errors import Diverged, InputError
from esft_jax.training.loop import run_training
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.setup import open_setup


@pytest.fixture
def make_given(make_config, tmp_path: Path):
    """Configurations of two steps that train a given expert, without a validation set."""
    (tmp_path / "cfg.json").write_text(json.dumps({"experts": {"1": [0]}}))
    given = {
        "expert_cfg": str(tmp_path / "cfg.json"),
        "mesh": {"data": 1},
        "data": make_config().data.__dict__ | {"valid": ()},
        "train": {"steps": 2, "batch_size": 4, "log_every": 1},
    }
    return lambda **changes: make_config(**given | changes)


def run(config, say=lambda text: None):
    return run_training(open_setup(config), say)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_base_that_is_not_finite_is_named_before_any_step(
    make_given, base: Path, tmp_path: Path, value: float
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(base, damaged)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    config = make_given(model=str(damaged))
    with pytest.raises(InputError, match=f"damaged: the base has a tensor .* finite: {name};"):
        run(config)
    assert not RunFolder(config.output).metrics.exists()


def test_a_run_without_an_update_has_no_result(make_given, monkeypatch) -> None:
    gather = PackedDataset.gather

    def gather_nan(dataset: PackedDataset, rows, size=None):
        batch = gather(dataset, rows, size)
        batch["loss_weights"] *= np.nan
        return batch

    monkeypatch.setattr(PackedDataset, "gather", gather_nan)
    config = make_given()
    for _ in range(2):  # given again, it has none either
        with pytest.raises(Diverged, match="step 2: every update was skipped"):
            run(config)
        assert not RunFolder(config.output).adapter.exists()
    assert len(list(RunFolder(config.output).skipped.iterdir())) == 2


def test_parameters_that_are_not_finite_are_no_result(make_given) -> None:
    # The largest rate that float32 holds, times an update of about 1 and a little more.
    optimizer = {"learning_rate": 3.4e38, "weight_decay": 10.0}
    config = make_given(optimizer=optimizer, train={"steps": 1, "batch_size": 4})
    with pytest.raises(Diverged, match=r"step 1: the parameter tuned_experts\.\w+ is not finite"):
        run(config)
    assert not RunFolder(config.output).adapter.exists()


def test_another_number_of_steps(make_given) -> None:
    """The cosine's jump is said once, more steps are done, and fewer than done are refused."""
    said: list[str] = []
    optimizer = {"learning_rate": 1e-3, "schedule": "cosine"}
    two = make_given(optimizer=optimizer)
    four = dataclasses.replace(two, train=dataclasses.replace(two.train, steps=4))
    folder = RunFolder(two.output)
    run(two, said.append)
    assert not [text for text in said if "cosine" in text]
    assert run(four, said.append).step == 4
    (jump,) = [text for text in said if "cosine" in text]
    assert jump == (
        "train.steps: 4 instead of 2; the cosine schedule is over all of them, so the learning "
        "rate of the next update is 0.00055 instead of 0.0001"
    )
    rates = [line["train/learning_rate"] for line in folder.logged()]
    assert rates[2] == pytest.approx(5.5e-4)
    before = (folder.adapter / "model.safetensors").read_bytes()
    assert run(four, said.append).step == 4  # it was finished
    assert (folder.adapter / "model.safetensors").read_bytes() == before
    assert len([text for text in said if "cosine" in text]) == 1
    with pytest.raises(InputError, match=r"train.steps: 2; .* has made 4 updates"):
        run(two)
    assert load_config(folder.config) == four
