"""Reports of run folders, which know what was trained, and of which model."""

import csv
import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esft_jax import report
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.config import RunConfig, save_config
from esft_jax.families import load_model_config
from esft_jax.report import main
from esft_jax.reporting.cost import CostModel
from esft_jax.routing.choose import choose_experts
from esft_jax.routing.scores import load_scores
from esft_jax.routing.select import select_experts
from esft_jax.selection_config import SelectConfig

MakeRun = Callable[..., Path]


@pytest.fixture(autouse=True)
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made, but no pixels of them."""
    monkeypatch.setattr(report, "to_png", lambda figure: b"")
    monkeypatch.setattr(report, "to_svg", lambda figure, name: "")


@pytest.fixture
def make_run(base: Path, scored: list[Path], tmp_path: Path) -> MakeRun:
    """The folder of a run on the first task's scores; keyword arguments are its configuration."""

    def make(
        name: str = "run", *, scores: bool = True, trained: bool = True, **changes: Any
    ) -> Path:
        folder = tmp_path / name
        values = {
            "model": str(base),
            "output": str(folder),
            "data": {"train": ("t.jsonl",), "sequence_length": 64},
        }
        config = RunConfig(**(values | changes))
        folder.mkdir()
        save_config(config, folder / "config.yaml")
        found = load_scores(scored[0])
        if scores:
            shutil.copytree(scored[0], folder / "scores")
        if trained and config.selects_experts:
            experts = choose_experts(config.select, [found], load_model_config(base), "bfloat16")
            experts.save(folder / "expert_cfg.json")
        return folder

    return make


def rows(output: Path, name: str) -> list[dict[str, str]]:
    with (output / "data" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def chosen(output: Path, task: str = "run") -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for row in rows(output, "experts"):
        if row["task"] == task and row["chosen"] == "1":
            found.setdefault(int(row["layer"]), set()).add(int(row["expert"]))
    return found


def trained(run: Path) -> dict[int, set[int]]:
    experts = ExpertConfig.load(run / "expert_cfg.json").experts
    return {layer: set(ids) for layer, ids in experts.items() if ids}


def words_of(output: Path) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<.*?>", "", (output / "report.html").read_text()))


@pytest.mark.parametrize(
    ("select", "words", "resampled"),
    [
        ({"top_p": 0.4}, "token score, p = 0.4", True),
        ({"method": "gate", "top_p": 0.15}, "gate score, p = 0.15", True),
        ({"top_k": 3}, "token score, 3 per layer", True),
        ({"max_parameters": 20_000}, "token score, at most 20,000 parameters", True),
        (
            {"max_parameters": 20_000, "allocation": "top_p"},
            "token score, at most 20,000 parameters, the same p in each layer",
            True,
        ),
        ({"top_p": 0.4, "random_seed": 3}, "replaced by as many random ones (seed 3)", False),
        ({"top_k": 2, "group_size": 2, "groups_from": "SCORES"}, "groups of 2", False),
    ],
)
def test_a_run_shows_what_it_trained(
    make_run: MakeRun,
    scored: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    select: dict[str, Any],
    words: str,
    resampled: bool,
) -> None:
    if "groups_from" in select:
        write_together(scored[0], tmp_path / "groups")
        select = select | {"groups_from": str(tmp_path / "groups")}
    run, out = make_run(select=SelectConfig(**select)), tmp_path / "out"
    assert main([str(run), "--output", str(out)]) == 0
    assert chosen(out) == trained(run)
    assert f"{words}" in words_of(out)
    assert "These are the experts that the run trained" in words_of(out)
    certainties = {row["certainty"] for row in rows(out, "experts")}
    assert (certainties != {""}) == resampled
    assert ("do not say why these experts were chosen" in words_of(out)) != resampled
    # The run's model gives costs and words, at the run's length.
    threshold = rows(out, "threshold")
    assert int(threshold[0]["parameters"]) > 0
    assert "at 64 tokens in a row" in words_of(out)
    assert not any(row["text"].startswith("#") for row in rows(out, "words"))
    here = [row for row in threshold if row["top_p"] == str(select.get("top_p"))]
    if resampled and here:
        assert int(here[0]["experts"]) == sum(map(len, trained(run).values()))
    assert capsys.readouterr().err == ""


def write_together(scores: Path, folder: Path) -> None:
    """The same scores, with counts of what was chosen together: neighbours always are."""
    content = json.loads((scores / "scores.json").read_text())
    size = len(content["token_scores"][0])
    pairs = [[int(a // 2 == b // 2) for a in range(size)] for b in range(size)]
    folder.mkdir()
    together = {"chosen_together": [pairs] * len(content["layers"])}
    (folder / "scores.json").write_text(json.dumps(content | together))


@pytest.mark.parametrize(
    ("options", "method", "top_p"),
    [
        (["--top-p", "0.2"], "gate", 0.2),
        (["--method", "token"], "token", 0.2),
        (["--method", "token", "--top-p", "0.3"], "token", 0.3),
    ],
)
def test_what_is_asked_for_counts_and_the_page_says_so(
    make_run: MakeRun, tmp_path: Path, options: list[str], method: Any, top_p: float
) -> None:
    run, out = make_run(select=SelectConfig(method="gate", top_p=0.15)), tmp_path / "out"
    assert main([str(run), *options, "--output", str(out)]) == 0
    expected = select_experts(load_scores(run / "scores"), method, top_p).experts
    assert chosen(out) == {layer: set(ids) for layer, ids in expected.items()}
    count = sum(map(len, trained(run).values()))
    assert f"the run itself trained {count} (gate score, p = 0.15)" in words_of(out)
    # Its own method is what it did.
    assert main([str(run), "--method", "gate", "--output", str(out)]) == 0
    assert chosen(out) == trained(run)


def test_several_runs_keep_their_selections(
    make_run: MakeRun, scored: list[Path], tmp_path: Path
) -> None:
    runs = [
        make_run("p", select=SelectConfig(top_p=0.4)),
        make_run("k", select=SelectConfig(method="gate", top_k=2)),
        make_run("all", method="full", train={"steps": 1}),
    ]
    out = tmp_path / "out"
    assert main([*map(str, runs), f"scores={scored[1]}", "--output", str(out)]) == 0
    for run in runs[:2]:
        assert chosen(out, run.name) == trained(run)
    for name, scores in (("all", runs[2] / "scores"), ("scores", scored[1])):
        expected = select_experts(
            load_scores(scores / "scores" if name == "scores" else scores), "token", 0.2
        )
        assert chosen(out, name) == {layer: set(ids) for layer, ids in expected.experts.items()}
    text = words_of(out)
    assert "p (token score, p = 0.4), k (gate score, 2 per layer), all (token" in text
    assert "The run itself did not choose any: method full trains all." in text


def test_what_is_trained_besides_is_paid_for(make_run: MakeRun, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = make_run(select=SelectConfig(top_p=0.4, also=("shared_experts", "non_expert_modules")))
    assert main([str(more), "--output", str(out)]) == 0
    (here,) = [row for row in rows(out, "threshold") if row["top_p"] == "0.4"]
    config = load_model_config(base)
    total, one = CostModel(config, 64).full.parameters, 3 * 32 * 16
    count = len(config.moe_layers) * config.router.num_experts - int(here["experts"])
    assert int(here["parameters"]) == total - count * one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "full"}, "method full trains all, so it measured none; expected them after"),
        ({"method": "lora"}, "method lora updates all experts or none, so it measured none"),
        ({"expert_cfg": "gone.json"}, "its experts were given, so it measured none"),
        ({}, "it has not measured any yet"),
        ({"select": {"scores": ("a", "b"), "combine": "union"}}, "those of 2 tasks; expected one"),
    ],
)
def test_a_run_without_scores_is_refused(
    make_run: MakeRun, tmp_path: Path, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    run = make_run(scores=False, trained=False, **changes)
    assert main([str(run), "--output", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run}: the run has no scores: ")
    assert message in error and error.count("\n") == 1


def test_a_run_that_selected_by_other_scores(
    make_run: MakeRun, scored: list[Path], tmp_path: Path
) -> None:
    given = SelectConfig(top_p=0.4, scores=(str(scored[0]),))
    run = make_run(scores=False, select=given)
    assert main([str(run), "--output", str(tmp_path / "out")]) == 0
    assert chosen(tmp_path / "out") == trained(run)


def test_a_model_that_is_gone_is_said(make_run: MakeRun, tmp_path: Path, capsys: Any) -> None:
    run = make_run(model="./gone")
    assert main([str(run), "--experts-per-token", "2", "--output", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert f"{run}: the run's model is not there (./gone: no such folder)" in captured.err
    assert {row["parameters"] for row in rows(tmp_path / "out", "threshold")} == {""}


def test_runs_of_different_models_are_refused(
    make_run: MakeRun, tmp_path: Path, capsys: Any
) -> None:
    runs = [make_run("one"), make_run("other", model="models/tiny-moe")]
    assert main([*map(str, runs), "--output", str(tmp_path / "out")]) == 2
    assert "another model than" in capsys.readouterr().err
    runs[1] = make_run("same")
    for number, run in enumerate(runs):
        path = run / "scores" / "scores.json"
        content = json.loads(path.read_text())
        content["provenance"]["base_fingerprint"] = str(number)
        path.write_text(json.dumps(content))
    assert main([*map(str, runs), "--output", str(tmp_path / "out")]) == 2
    assert f"{runs[1]}: base_fingerprint: measured on another base" in capsys.readouterr().err
    runs.insert(0, make_run("unknown"))  # does not say it
    assert main([*map(str, runs), "--output", str(tmp_path / "out")]) == 2
    assert f"{runs[2]}: base_fingerprint: measured on another base" in capsys.readouterr().err


def test_experts_of_another_model_are_refused(
    make_run: MakeRun, tmp_path: Path, capsys: Any
) -> None:
    run = make_run()
    ExpertConfig({1: (99,)}).save(run / "expert_cfg.json")
    assert main([str(run), "--output", str(tmp_path / "out")]) == 2
    assert "expert_cfg.json: expert config: layer 1: expert 99" in capsys.readouterr().err


def test_what_a_report_cannot_be_of_is_named(
    make_run: MakeRun, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is passed over: no model that was changed since, no file that cannot be read."""
    run, out = make_run(), tmp_path / "out"

    def refused(message: str, *more: str) -> None:
        assert main([str(run), "--output", str(out), *more]) == 2
        assert message in capsys.readouterr().err
        assert not (out / "data").exists()

    path, other = run / "scores" / "scores.json", tmp_path / "other"
    content = json.loads(path.read_text())
    content["provenance"]["config_fingerprint"] = load_model_config(base).fingerprint
    path.write_text(json.dumps(content))
    shutil.copytree(base, other)
    raw = json.loads((other / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (other / "config.json").write_text(json.dumps(raw))
    refused(f"{run}: config_fingerprint: measured on another base", "--model", str(other))
    ExpertConfig({}).save(run / "expert_cfg.json")
    refused("expert_cfg.json: expert config: nothing is selected")
    (out / "report.html").mkdir(parents=True)
    (run / "expert_cfg.json").unlink()
    refused("report.html is a folder; expected a file")
    (run / "config.yaml").unlink()
    (run / "config.yaml").symlink_to("nowhere")
    refused("config.yaml: cannot be read: No such file")


def test_scores_that_resamples_cannot_tell(scored: list[Path], tmp_path: Path) -> None:
    """They decide the choice, stand in the table, and are compared with the others."""
    scores = load_scores(scored[0])
    turned = scores.token[:, ::-1].copy()
    further = dataclasses.replace(scores, contribution=turned, gate_taylor=scores.token)
    further.save(tmp_path / "further")
    out = tmp_path / "out"
    arguments = ["--method", "contribution", "--top-p", "0.4", "--output", str(out)]
    assert main([str(tmp_path / "further"), *arguments]) == 0
    expected = select_experts(further, "contribution", 0.4).experts
    assert chosen(out, "further") == {layer: set(ids) for layer, ids in expected.items()}
    table = rows(out, "experts")
    values = [float(row["contribution_score"]) for row in table]
    assert values == pytest.approx(turned.flatten(), rel=1e-5)
    assert "contrast_score" not in table[0]
    assert {row["certainty"] for row in table} == {""}
    assert "contributions are kept of the whole sample only" in words_of(out)
    assert "The mean norm of what an expert adds" in words_of(out)
    agreements = {row["method"]: float(row["agreement"]) for row in rows(out, "scores")}
    assert set(agreements) == {"token", "gate", "gate_share", "gate_taylor"}
    counts = [len(ids) for ids in expected.values()]
    both = [
        len(set(np.argsort(-token, kind="stable")[:count].tolist()) & set(expected[layer]))
        for layer, token, count in zip(scores.layers, scores.token.round(4), counts, strict=True)
    ]
    share = pytest.approx(sum(both) / sum(counts), rel=1e-5)
    assert agreements["token"] == agreements["gate_taylor"] == share
