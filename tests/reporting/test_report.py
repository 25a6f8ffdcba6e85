"""The command from end to end: what it prints, writes and refuses."""

import csv
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from esft_jax.report import main
from esft_jax.routing.scores import load_scores
from esft_jax.routing.select import select_experts


def rows(report: Path, name: str) -> list[dict[str, str]]:
    with (report / "data" / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mean(table: list[dict[str, str]], task: str, column: str) -> float:
    cells = [float(row[column]) for row in table if row["task"] == task]
    return sum(cells) / len(cells)


def test_writes_page_figures_and_numbers(report: Path) -> None:
    figures = {path.stem for path in (report / "figures").glob("*.png")}
    expected = {"concentration", "overlap", "layers", "sample-size", "threshold"}
    assert figures == expected | {"experts-0", "experts-1", "methods"}
    data = {path.stem for path in (report / "data").glob("*.csv")}
    assert data == expected | {"experts", "scores", "words", "methods"}


def test_the_numbers_are_those_of_the_selection(report: Path, scored: list[Path]) -> None:
    scores = load_scores(scored[0])
    chosen = select_experts(scores, "token", 0.5).experts
    table = [row for row in rows(report, "experts") if row["task"] == "one"]
    found = {(int(row["layer"]), int(row["expert"])) for row in table if row["chosen"] == "1"}
    assert found == {(layer, expert) for layer, ids in chosen.items() for expert in ids}
    for row in table:
        assert 0 <= float(row["certainty"]) <= 1
    layers = [row for row in rows(report, "layers") if row["task"] == "one"]
    assert [int(row["experts"]) for row in layers] == [len(ids) for ids in chosen.values()]
    served = scores.token[0, list(chosen[scores.layers[0]])].sum()
    assert float(layers[0]["assignments_served"]) == pytest.approx(served, rel=1e-5)
    here = [
        row for row in rows(report, "threshold") if row["task"] == "one" and row["top_p"] == "0.5"
    ]
    assert int(here[0]["experts"]) == len(found)
    assert int(here[0]["adapter_bytes"]) == 2 * int(here[0]["parameters"])


def test_words_name_tokens(report: Path) -> None:
    words = [row for row in rows(report, "words") if row["task"] == "two"]
    assert {int(row["token"]) for row in words} == set(range(300, 340))
    met = [float(row["tuned_experts_met"]) for row in words]
    assert met == sorted(met, reverse=True)
    assert not any(row["text"].startswith("#") for row in words)  # the tokenizer is known


def test_summary_alone_gives_what_it_can(scored: list[Path], tmp_path: Path, capsys) -> None:
    output = tmp_path / "out"
    summary = scored[0] / "summary.json"
    assert main([f"task={summary}", "--experts-per-token", "2", "--output", str(output)]) == 0
    assert {path.stem for path in (output / "data").iterdir()} == {
        "concentration",
        "experts",
        "layers",
        "scores",
        "threshold",
    }
    page = (output / "report.html").read_text()
    assert "Not known: these scores came without the routing" in page
    assert "--model" in page
    assert "Not known" in capsys.readouterr().out


def test_what_a_sweep_found(report: Path) -> None:
    found = rows(report, "methods")
    assert [row["method"] for row in found] == ["base", "full", "token", "lora"]
    assert float(found[1]["average"]) == 66  # of 60, 70, 62 and 72
    page = re.sub(r"<.*?>", "", (report / "report.html").read_text())
    assert "On the tasks, full does best: 66.0 ± 1.4 on average, where the base has 6.0." in page
    assert "Within a standard deviation of it: token." in page
    assert "lora forgets least" in page
    assert "rises by 0.20 nats per token, with full by 0.80." in page
    assert "4 MB" in page and "1 MB" in page


def test_a_sweep_without_results_is_refused(
    scored: list[Path], sweep: Path, tmp_path: Path, capsys
) -> None:
    content = json.loads(sweep.read_text()) | {"output": str(tmp_path / "empty")}
    path = tmp_path / "sweep.yaml"
    path.write_text(json.dumps(content))
    arguments = [str(scored[0]), "--sweep", str(path), "--output", str(tmp_path / "out")]
    assert main(arguments) == 2
    assert "run `sweep` first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("method", "top_p"), [("gate", 0.1), ("gate_share", 0.2)])
def test_by_gate_scores(scored: list[Path], tmp_path: Path, method, top_p) -> None:
    arguments = [str(scored[0]), "--method", method, "--output", str(tmp_path)]
    assert main(arguments) == 0
    scores = load_scores(scored[0])
    chosen = select_experts(scores, method, top_p)
    found = [row for row in rows(tmp_path, "experts") if row["chosen"] == "1"]
    assert len(found) == chosen.num_experts_selected
    named = [float(row[f"{method}_score"]) for row in rows(tmp_path, "experts")]
    np.testing.assert_allclose(named, scores.of(method).ravel(), rtol=1e-5)
    # Resamples are judged by the same scores: they choose what is chosen.
    sure = [float(row["certainty"]) for row in found]
    assert np.mean(sure) > 0.8


def test_a_report_says_that_gate_scores_are_shares(scored: list[Path], tmp_path: Path) -> None:
    scores = dataclasses.replace(load_scores(scored[0]), gate=None)
    scores.save(tmp_path / "in")
    assert main([str(tmp_path / "in"), "--experts-per-token", "2", "--output", str(tmp_path)]) == 0
    (first, *_) = rows(tmp_path, "experts")
    assert first["gate_score"] == "" and float(first["gate_share_score"]) > 0
    assert "gate_share" in rows(tmp_path, "layers")[0]
    assert "gate mass is gate share" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{one}", "{one}"], "'one' names no new task; expected NAME=PATH"),
        (["nowhere"], "nowhere: cannot be read"),
        (["{one}", "--top-p", "2"], "--top-p: expected less than or equal to 1"),
        (["{one}", "--sequence-length", "0"], "--sequence-length: expected greater than or equal"),
        (["{one}", "--model", "models/deepseek-v2-lite"], "experts per token: [2, 6]"),
        (["{one}", "other={other}"], "expected scores of one model"),
        (
            ["{other}", "--experts-per-token", "0"],
            "--experts-per-token: expected greater than or equal",
        ),
        (["{other}"], "--experts-per-token: 6; expected a number from 1 to the 1 experts"),
    ],
)
def test_bad_input_is_one_line(
    scored: list[Path], tmp_path: Path, capsys, arguments: list[str], message: str
) -> None:
    other = tmp_path / "scores.json"
    other.write_text('{"layers": [1], "token_scores": [[1.0]], "gate_scores": [[0.5]]}')
    filled = [argument.format(one=scored[0], other=other) for argument in arguments]
    output = tmp_path / "out"
    assert main([*filled, "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not output.exists()


def write_log(folder: Path, ids: list[str]) -> None:
    """A layer of tokens with two experts each, a sequence of two tokens in each line."""
    folder.mkdir()
    lines = [f"{text}\t\t0.5\t0.25\t0.5\t0.25\n" for text in ids]
    (folder / "expert_weights_1.txt").write_text("".join(lines))


def test_logs_need_not_show_every_expert(tmp_path: Path) -> None:
    """Nothing else says how many there are."""
    write_log(tmp_path / "all", ["0\t1\t2\t7"] * 8)
    write_log(tmp_path / "few", ["0\t1\t1\t2"] * 8)
    output = tmp_path / "out"
    arguments = [str(tmp_path / "all"), str(tmp_path / "few"), "--experts-per-token", "2"]
    assert main([*arguments, "--output", str(output)]) == 0
    experts = [row for row in rows(output, "experts") if row["task"] == "few"]
    assert [int(row["expert"]) for row in experts] == list(range(8))
    assert [float(row["token_score"]) for row in experts][:4] == [0.25, 0.5, 0.25, 0]


def test_any_name_of_a_task(scored: list[Path], tmp_path: Path, capsys) -> None:
    """Nothing in it is markup for a terminal or a figure."""
    output = tmp_path / "lr=1"
    names = ["a[/b]", "c[d]", "$x^{$"]
    tasks = [f"{name}={path}" for name, path in zip(names, [*scored, scored[0]], strict=True)]
    assert main([*tasks, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in names)
    # A folder with such a name is one, and no NAME=PATH.
    (output / "scores").symlink_to(scored[0])
    assert main([str(output), "--output", str(tmp_path / "out")]) == 0
    assert {row["task"] for row in rows(tmp_path / "out", "layers")} == {"lr=1"}


def test_nothing_of_an_earlier_report_stays(scored: list[Path], tmp_path: Path) -> None:
    assert main([*map(str, scored), "--output", str(tmp_path)]) == 0
    assert (tmp_path / "figures" / "experts-1.png").exists()
    assert (tmp_path / "data" / "overlap.csv").exists()
    assert main([f"task={scored[0] / 'summary.json'}", "--output", str(tmp_path)]) == 0
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == {
        "concentration",
        "experts-0",
        "layers",
        "threshold",
    }
    assert not (tmp_path / "data" / "overlap.csv").exists()


def test_released_logs(esft_reference: Path, tmp_path: Path) -> None:
    """What is known of DeepSeek-V2-Lite on two tasks of the paper."""
    logs = esft_reference / "results" / "expert_scores"
    assert main([str(logs / "intent"), str(logs / "law"), "--output", str(tmp_path)]) == 0
    layers = rows(tmp_path, "layers")
    for task, mass, shared, experts, served, met in (
        ("intent", 0.330, 5.81, 124, 0.223, 0.79),
        ("law", 0.277, 5.35, 153, 0.215, 0.73),
    ):
        assert round(mean(layers, task, "top_6_gate_mass"), 3) == mass
        assert sum(int(row["experts"]) for row in layers if row["task"] == task) == experts
        assert round(mean(layers, task, "assignments_served"), 3) == served
        assert round(mean(layers, task, "tokens_served"), 2) == met
        overlap = {(row["task"], row["other"]): row for row in rows(tmp_path, "overlap")}
        assert round(float(overlap[task, task]["shared_top_k"]), 2) == shared
        assert float(overlap[task, task]["chance"]) == 6 * 6 / 64
    assert float(overlap["intent", "law"]["shared_top_k"]) < 1


def test_files_of_others_stay(scored: list[Path], tmp_path: Path) -> None:
    for name in ("data/mine.csv", "data/._experts.csv", "data/words.csv", "figures/mine.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    summary = scored[0] / "summary.json"
    assert main([f"t={summary}", "--experts-per-token", "2", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "data" / "mine.csv").exists() and (tmp_path / "figures/mine.png").exists()
    assert (tmp_path / "data" / "._experts.csv").exists()
    assert not (tmp_path / "data" / "words.csv").exists()  # of an earlier report


def test_a_link_does_not_lead_out(scored: list[Path], tmp_path: Path, capsys) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "data").symlink_to(tmp_path / "elsewhere")
    assert main([str(scored[0]), "--output", str(tmp_path / "out")]) == 2
    assert "out/data: is a link" in capsys.readouterr().err
    assert not any((tmp_path / "elsewhere").iterdir())
