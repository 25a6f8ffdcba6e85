"""`python -m esft_jax.sweep`: a whole table, and one that is killed on the way."""

import csv
import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from esft_jax import sweep
from esft_jax.sweeping.config import base_cells, config_sha256, load_sweep, run_config
from esft_jax.sweeping.record import CellResult, Record
from esft_jax.sweeping.run import run_sweep


@pytest.fixture(scope="module")
def sweep_file(short_run: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods, of which one tries two learning rates, on two tasks; two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    evaluation = ["train.steps=4", "train.eval_every=2", "evaluation.max_new_tokens=2"]
    evaluation += ["evaluation.limit=2", f"evaluation.data={chats}"]
    others = f"evaluation.others={{numbers: {{valid: [{chats}], format: messages}}}}"
    content = {
        "output": str(folder / "done"),
        "run": str(short_run),
        "tasks": {"sums": [*evaluation, others], "doubles": [*evaluation, "score.samples=4"]},
        "methods": {
            "token": ["mesh.data=1"],
            "full": ["method=full", "train.verify_frozen=false", "mesh.data=1"],
        },
        "seeds": [0, 1],
        "learning_rates": {"full": [1e-4, 1e-3]},
    }
    path = folder / "sweep.json"
    path.write_text(json.dumps(content))
    return path


def results(output: Path) -> dict[str, dict]:
    """What the record says of every cell, but how long it took."""
    path, found = output / "results.jsonl", {}
    for line in path.read_text().splitlines() if path.exists() else ():
        content = json.loads(line)
        name = "/".join(map(str, content.pop("cell").values()))
        assert name not in found, "a finished cell was run again"
        found[name] = {k: v for k, v in content.items() if not k.endswith("seconds")}
    return found


def table(output: Path) -> list[dict[str, str]]:
    rows = list(csv.DictReader((output / "table.csv").open()))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture
def small(sweep_file: Path, tmp_path: Path) -> Path:
    """A sweep of the base and one method on one task, in the folder `small`."""
    content = json.loads(sweep_file.read_text())
    content |= {"output": str(tmp_path / "small"), "seeds": [0], "learning_rates": {}}
    content["tasks"], content["methods"] = (
        {name: content[key][name]} for key, name in (("tasks", "sums"), ("methods", "token"))
    )
    config = tmp_path / "small.json"
    config.write_text(json.dumps(content))
    return config


def test_one_cell_after_the_other(small: Path, capsys: pytest.CaptureFixture) -> None:
    """A base, a method, a task; again it runs nothing."""
    output = small.with_suffix("")
    assert sweep.main(["--config", str(small)]) == 0
    found = results(output)
    assert found.keys() == {"sums/base/None/0", "sums/token/None/0"}
    first, *lines = capsys.readouterr().out.splitlines()
    assert re.search(r", float32: sweep 1 methods x 1 tasks into .*small$", first)
    cells = [line for line in lines if line.startswith("cell ")]
    assert cells[0] == "cell 1 of 2: sums/base/seed-0"
    assert re.fullmatch(r"cell 2 of 2: sums/token/seed-0; about [\d:]+ left", cells[1])
    trained = found["sums/token/None/0"]
    assert trained["valid_loss"] != found["sums/base/None/0"]["valid_loss"]
    assert trained["retention"].keys() == {"numbers"}
    record = (output / "results.jsonl").read_bytes()
    assert sweep.main(["--config", str(small)]) == 0
    assert (output / "results.jsonl").read_bytes() == record


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_stops_a_cell_stops_the_sweep(
    number: int, small: Path, monkeypatch, capsys: pytest.CaptureFixture
) -> None:
    """Ctrl-C is no success of the command."""
    stopped = SimpleNamespace(result=None, step=3, stopped_by=number)
    table_of, ran = load_sweep(small), []

    def run_training(setup, say):
        ran.append(setup)
        return stopped

    monkeypatch.setattr("esft_jax.sweeping.run.run_training", run_training)
    (cell,) = base_cells(table_of)
    done = CellResult(cell, config_sha256(run_config(table_of, cell)), "chrf", 12.5, 0.5)
    Record(small.with_suffix("") / "results.jsonl").add(done)
    code = 130 if number == signal.SIGINT else 0
    assert sweep.main(["--config", str(small)]) == code
    assert "sums/token/seed-0: stopped at step 3 and saved" in capsys.readouterr().out
    assert len(ran) == 1 and len(results(small.with_suffix(""))) == 1


@pytest.mark.slow
def test_a_run_that_diverges_does_not_end_the_sweep(
    small: Path, capsys: pytest.CaptureFixture
) -> None:
    output, content = small.with_suffix(""), json.loads(small.read_text())
    content["learning_rates"] = {"token": [1e38, 1e-4]}
    small.write_text(json.dumps(content))
    assert sweep.main(["--config", str(small)]) == 0
    found = results(output)
    diverged, trained = found["sums/token/1e+38/0"], found["sums/token/0.0001/0"]
    assert diverged["value"] is None and diverged["valid_loss"] is None
    assert 0 < trained["valid_loss"] < 10
    assert [row["learning_rate"] for row in table(output)] == ["", "0.0001"]
    assert "diverged, and left out: sums/token/lr-1e+38/seed-0" in capsys.readouterr().out
    # What they could be resumed from is gone, once they are written down.
    assert not list(output.glob("cells/**/checkpoints"))


# Holds the claim of the base's cell until the other cell is finished; may write down a result.
HOLDER = """
import fcntl, sys, time
from pathlib import Path

output, line = Path(sys.argv[1]), sys.argv[2]
(output / "claims").mkdir(parents=True)
claim = (output / "claims" / "sums_base_seed-0").open("w")
fcntl.flock(claim, fcntl.LOCK_EX)
print("held", flush=True)
results = output / "results.jsonl"
while not results.exists() or not results.read_text().endswith("\\n"):
    time.sleep(0.1)
with results.open("a") as file:
    file.write(line)
"""


@pytest.mark.parametrize("finished", [True, False])
def test_a_cell_that_another_process_runs_is_left_to_it(small: Path, finished: bool) -> None:
    output, table_of = small.with_suffix(""), load_sweep(small)
    (cell,) = base_cells(table_of)
    theirs = CellResult(cell, config_sha256(run_config(table_of, cell)), "chrf", 12.5, 0.5)
    line = json.dumps(dataclasses.asdict(theirs)) + "\n" if finished else ""
    command = [sys.executable, "-c", HOLDER, str(output), line]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        assert sweep.main(["--config", str(small)]) == 0
    found = results(output)  # which no cell is in twice
    assert list(found) == ["sums/token/None/0", "sums/base/None/0"]
    assert (found["sums/base/None/0"]["value"] == 12.5) == finished
    assert (output / "table.csv").read_text().count("\n") == 3


@pytest.fixture(scope="module")
def done(sweep_file: Path) -> Path:
    """The folder of the whole sweep."""
    assert sweep.main(["--config", str(sweep_file)]) == 0
    return sweep_file.parent / "done"


@pytest.mark.slow
def test_every_cell_is_run_once_and_judged(done: Path, sweep_file: Path) -> None:
    found = results(done)
    # The base, then three learning rates in all with the first seed, then two with the second.
    assert len(found) == 2 * (1 + 3 + 2)
    assert {name.split("/")[1] for name in found} == {"base", "token", "full"}
    for name, result in found.items():
        task, method, _, _ = name.split("/")
        assert 0 < result["valid_loss"] < 10
        assert result["retention"].keys() == ({"numbers"} if task == "sums" else set())
        shares = {"base": 0, "full": 1}
        if method in shares:
            assert result["trained"] == shares[method] * result["total"]
        else:
            assert 0 < result["trained"] < result["total"] / 2
            assert 4 * result["trained"] < result["stored_bytes"] < 4.2 * result["trained"] + 10_000
        if method != "base":
            assert result["step_bytes"] > 0
    full = [row for row in table(done) if row["method"] == "full"]
    losses = {
        rate: sum(found[f"{task}/full/{rate}/0"]["valid_loss"] for task in ("sums", "doubles"))
        for rate in ("0.0001", "0.001")
    }
    assert [row["learning_rate"] for row in full] == [min(losses, key=losses.__getitem__)]
    assert full[0]["seeds"] == "2"
    # What a run could be resumed from is gone; its result is not.
    assert not list(done.glob("cells/*/*/**/checkpoints"))
    assert len(list(done.glob("cells/*/token/*/adapter/model.safetensors"))) == 4


def same_sweep(done: Path, sweep_file: Path, name: str) -> tuple[Path, Path, list[str]]:
    """The sweep in another folder: this folder, its configuration, and the command that runs it."""
    config = sweep_file.with_name(f"{name}.json")
    config.write_text(sweep_file.read_text().replace("/done", f"/{name}"))
    command = [sys.executable, "-m", "esft_jax.sweep", "--config", str(config)]
    return done.with_name(name), config, command


@pytest.mark.slow
def test_processes_share_a_sweep(done: Path, sweep_file: Path) -> None:
    """One of two is killed, and another one comes; no cell is run twice."""
    output, _, command = same_sweep(done, sweep_file, "shared")
    with (output.parent / "shared-log").open("a") as log:
        first, second = (subprocess.Popen(command, stdout=log, stderr=log) for _ in range(2))
        while len(results(output)) < 5:
            time.sleep(0.1)
        first.kill()
        third = subprocess.Popen(command, stdout=log, stderr=log)
        codes = [process.wait() for process in (first, second, third)]
    assert codes == [-signal.SIGKILL, 0, 0], (output.parent / "shared-log").read_text()
    assert results(output) == results(done)
    assert table(output) == table(done)
    shutil.rmtree(output)


@pytest.mark.slow
def test_a_killed_sweep_ends_with_the_same_table(done: Path, sweep_file: Path) -> None:
    output, config, command = same_sweep(done, sweep_file, "killed")
    kept: dict[str, dict] = {}
    for number, enough in (
        (signal.SIGKILL, 1),
        (signal.SIGKILL, 4),
        (signal.SIGTERM, 6),
        (signal.SIGKILL, 9),
    ):
        with (output.parent / "log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            while len(results(output)) < enough:
                assert process.poll() is None, (output.parent / "log").read_text()
                time.sleep(0.05)
            time.sleep(1)  # into the next cell
            process.send_signal(number)
            code = process.wait()
        assert code == (-signal.SIGKILL if number == signal.SIGKILL else 0)
        now = results(output)
        assert kept.items() <= now.items()
        kept = now
    assert run_sweep(load_sweep(config), print) is not None
    assert kept.items() <= results(output).items()
    assert results(output) == results(done)
    assert table(output) == table(done)
    shutil.rmtree(output)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[nowhere.jsonl]", "nowhere.jsonl"),
        ("data.mix={more: {train: [nowhere.jsonl]}}", "nowhere.jsonl"),
        ("select.group_size=3", "select.group_size: 3 does not divide"),
        ("data.sequence_length=100000", "data.sequence_length: 100000 tokens; the model's limit"),
    ],
)
def test_what_a_run_would_refuse_is_found_before_any_is_run(
    small: Path, override: str, message: str, capsys: pytest.CaptureFixture
) -> None:
    content = json.loads(small.read_text())
    content["methods"]["token"].append(override)
    small.write_text(json.dumps(content))
    assert sweep.main(["--config", str(small)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cell sums/token/seed-0: ") and message in line
    assert not (small.with_suffix("") / "results.jsonl").exists()


def test_a_mistake_in_a_cell_is_found_before_any_is_run(
    sweep_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    config = tmp_path / "sweep.json"
    text = sweep_file.read_text().replace("method=full", "method=fool")
    config.write_text(text.replace("/done", "/never"))
    assert sweep.main(["--config", str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: cell sums/full/lr-0.0001/seed-0: override 'method=fool'")
    assert not (sweep_file.parent / "never").exists()
