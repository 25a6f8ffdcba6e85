"""A run goes on only with the base, the scores and the validation data that it began with."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from esft_jax.config import RunConfig
from esft_jax.errors import InputError
from esft_jax.training import loop
from esft_jax.training.result import RunResult
from esft_jax.training.setup import open_setup
from tests.checkpoint.test_identity import CHANGES


def run(config: RunConfig) -> RunResult:
    return loop.run_training(open_setup(config), say=lambda text: None)


@pytest.fixture(scope="module")
def begun(base, chats, tmp_path_factory):
    """Two steps of a run."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(base, folder / "model")
    shutil.copy(chats, folder / "valid.jsonl")
    config = RunConfig(
        model=str(folder / "model"),
        output=str(folder / "run"),
        dtype="float32",
        mesh={"data": 1},
        data={
            "train": (str(chats),),
            "valid": (str(folder / "valid.jsonl"),),
            "sequence_length": 32,
        },
        score={"samples": 8, "sequence_length": 32, "batch_size": 4},
        select={"top_p": 0.3},
        train={"steps": 2, "batch_size": 4, "eval_every": 2, "save_every": 2, "log_every": 1},
    )
    run(config)
    return config


def longer(config, **changes):
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3), **changes)


@pytest.fixture
def again(begun, tmp_path):
    """The same in a copy of the run's folder; the model and the data are put back at the end."""
    model, valid = begun.model, begun.data.valid[0]
    shutil.copytree(begun.output, tmp_path / "run")
    shutil.copytree(model, tmp_path / "model")
    shutil.copy(valid, tmp_path / "valid.jsonl")
    edited = (
        (tmp_path / "run" / "config.yaml").read_text().replace(begun.output, str(tmp_path / "run"))
    )
    (tmp_path / "run" / "config.yaml").write_text(edited)
    yield longer(begun, output=str(tmp_path / "run"))
    shutil.rmtree(model)
    shutil.copytree(tmp_path / "model", model)
    shutil.copy(tmp_path / "valid.jsonl", valid)


def test_provenance_names_all_parts(begun):
    identity = open_setup(begun).identity
    for name in ("adapter/manifest.json", "scores/scores.json"):
        content = json.loads(Path(begun.output, name).read_text())
        found = content.get("provenance", content)
        assert found | identity == found and "base_fingerprint" in found


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_another_base_does_not_continue_a_run(again, tmp_path, change, message):
    change(Path(again.model))
    with pytest.raises(InputError, match=message.replace("trained", "measured")):
        run(again)
    # Nor without the scores, by what its checkpoint says.
    shutil.rmtree(tmp_path / "run" / "scores")
    with pytest.raises(InputError, match=f"checkpoint of step 2 has {message.split(':')[0]}"):
        run(again)


def test_scores_of_another_base_are_refused(begun, again, tmp_path):
    CHANGES[1][0](Path(again.model))
    select = dataclasses.replace(begun.select, scores=(f"{begun.output}/scores",))
    config = longer(begun, output=str(tmp_path / "new"), select=select)
    with pytest.raises(InputError, match="scores: config_fingerprint: measured on another base"):
        open_setup(config)  # before weights are read


def test_other_validation_data_do_not_continue_a_run(again):
    path = again.data.valid[0]
    with open(path) as file:
        lines = file.readlines()
    with open(path, "w") as file:
        file.writelines(lines[:3])
    with pytest.raises(InputError, match="checkpoint of step 2 has valid_sha256"):
        run(again)
