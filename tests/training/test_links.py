"""What lies in a run's folder before the run: links and strangers are refused, nothing is lost."""

from pathlib import Path

import pytest

from esft_jax.config import RunConfig
from esft_jax.errors import InputError
from esft_jax.evaluation.run import check_evaluation
from esft_jax.training.run_folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return RunConfig(model="m", output=str(tmp_path / "run"), data={"train": ("x.jsonl",)})


@pytest.fixture
def run(config: RunConfig) -> RunFolder:
    run = RunFolder(config.output)
    run.create(config)
    return run


@pytest.mark.parametrize(
    "name",
    [
        "adapter",
        "model",
        "scores",
        "checkpoints",
        "checkpoints/last",
        "evaluation/others/deep",
        "metrics.jsonl",
        "tensorboard",
        "skipped",
        "profile",
    ],
)
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_does_not_lead_out(run, config, tmp_path, name, dangling):
    if not dangling:
        (tmp_path / "elsewhere").mkdir()
    link = run.path / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"run/{name}: is a link"):
        run.check(config)


def test_an_evaluation_does_not_follow_links(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    run.evaluation.symlink_to(tmp_path / "elsewhere")
    config = RunConfig(
        model="m",
        output=str(run.path),
        data={"train": ("x.jsonl",)},
        evaluation={"data": "x.jsonl", "metric": "exact_match"},
    )
    with pytest.raises(InputError, match="run/evaluation: is a link"):
        check_evaluation(config)


def test_a_run_may_be_reached_by_a_link(run, config, tmp_path):
    (tmp_path / "link").symlink_to(run.path)
    RunFolder(tmp_path / "link").check_way()
    run.check(config)


@pytest.mark.parametrize("result", ["adapter", "model"])
def test_what_is_no_result_is_not_replaced(run, config, result):
    folder = run.path / result
    folder.mkdir()
    (folder / "model.safetensors").touch()
    (folder / ".DS_Store").touch()
    run.check(config)
    (folder / "thesis.tex").touch()
    with pytest.raises(InputError, match="thesis.tex: is no part of a result"):
        run.check(config)


def test_hidden_files_are_in_nobodys_way(config):
    run = RunFolder(config.output)
    run.path.mkdir()
    (run.path / ".DS_Store").touch()
    (run.path / ".ipynb_checkpoints").mkdir()
    run.check(config)
    (run.path / "thesis.tex").touch()
    with pytest.raises(InputError, match="is not empty and holds no run"):
        run.check(config)
