"""What other loggers get is what `metrics.jsonl` holds, over a resumption too."""

import json
import os
import struct
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from esft_jax.config import RunConfig
from esft_jax.errors import InputError
from esft_jax.training import loggers
from esft_jax.training.loggers import check_trackers, open_trackers
from esft_jax.training.metrics_log import MetricsLog
from esft_jax.training.run_folder import RunFolder

# By metric name, the figure of each step.
Figures = dict[str, dict[int, float]]


@pytest.fixture
def log(make_config) -> Callable[[str], tuple[RunFolder, Figures]]:
    """Logs a few lines of a run that is stopped after step 3 and goes on from step 2."""

    def log(name: str) -> tuple[RunFolder, Figures]:
        config = make_config(train={"log_to": (name,)})
        folder = RunFolder(config.output)
        folder.create(config)
        session(
            config, None, {0: {"valid/loss": 2.5}, 2: {"train/loss": 1.5}, 3: {"train/loss": 9}}
        )
        session(config, 2, {3: {"train/loss": 1.25}, 4: {"train/loss": 1, "train/loss/a.b-c": 3}})
        figures: Figures = defaultdict(dict)
        for line in folder.logged():
            for key in line.keys() - {"step", "time"}:
                figures[key][int(line["step"])] = line[key]
        assert figures["train/loss"] == {2: 1.5, 3: 1.25, 4: 1}
        return folder, figures

    return log


def session(config: RunConfig, start: int | None, lines: dict[int, dict[str, float]]) -> None:
    said: list[str] = []
    folder, board = RunFolder(config.output), "tensorboard" in config.train.log_to
    with (
        open_trackers(folder, config, said.append) as trackers,
        MetricsLog(folder, start, 4, tensorboard=board, trackers=trackers) as log,
    ):
        assert len(trackers) == len(config.train.log_to) - board
        for step, scalars in lines.items():
            log.write(step, scalars | {"train/grad_norm": float("nan")})  # which is left out
    assert not said


def records(path: Path) -> Iterator[bytes]:
    """Of a file of TensorFlow: length, checksum, content, checksum, and again."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def test_tensorboard(log) -> None:
    folder, expected = log("tensorboard")
    found: Figures = defaultdict(dict)
    for path in sorted(folder.tensorboard.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        for event in map(Event.FromString, records(path)):
            if event.HasField("session_log"):  # as TensorBoard does with what is older
                for steps in found.values():
                    for step in [step for step in steps if step >= event.step]:
                        del steps[step]
            for value in event.summary.value:
                found[value.tag][event.step] = value.simple_value
    assert found == expected


def wandb_records(path: Path) -> Iterator[bytes]:
    """Of a file of W&B: as LevelDB's logs, parts of records in blocks of 32 KiB."""
    data, at, record = path.read_bytes(), len(b":W&B") + 3, b""
    while at + 7 <= len(data):
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if kind == 0:  # the rest of a block is empty
            at += -at % (1 << 15) or 7
            continue
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        at += left if (left := -at % (1 << 15)) < 7 else 0
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_wandb_offline(log, monkeypatch) -> None:
    pytest.importorskip("wandb", reason="needs pip install 'esft-jax[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder, expected = log("wandb")
    found: Figures = defaultdict(dict)
    files = sorted(folder.path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len({path.name for path in files}) == 1  # both sessions are of one run
    for path in files:
        for record in map(Record.FromString, wandb_records(path)):
            row = {
                item.key or item.nested_key[0]: json.loads(item.value_json)
                for item in record.history.item
            }
            for key in row.keys() - {"step"}:
                if not key.startswith("_"):
                    found[key][row["step"]] = row[key]
    assert found == expected


def test_trackio_on_this_machine(log, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="needs pip install 'esft-jax[trackio]'")
    from trackio.sqlite_storage import SQLiteStorage

    folder, expected = log("trackio")
    (run,) = SQLiteStorage.get_runs("esft")
    assert run.startswith(folder.path.name)
    found: Figures = defaultdict(dict)
    for row in SQLiteStorage.get_logs("esft", run):
        for key in row.keys() & expected.keys():
            found[key][row["step"]] = row[key]
    assert found == expected


@pytest.mark.slow
def test_mlflow_in_a_file(log, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow = pytest.importorskip("mlflow", reason="needs pip install 'esft-jax[mlflow]'")
    _, expected = log("mlflow")
    client = mlflow.MlflowClient()
    place = client.get_experiment_by_name("esft").experiment_id
    (run,) = client.search_runs([place])
    assert run.info.status == "FINISHED" and run.data.params["train.steps"] == "500"
    found: Figures = defaultdict(dict)
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            found[name][point.step] = point.value
    assert found == expected


def test_a_missing_library_is_named_with_the_way_to_get_it(monkeypatch) -> None:
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    check_trackers(("tensorboard",))
    with pytest.raises(InputError, match=r"train.log_to: wandb .* pip install 'esft-jax\[wandb\]'"):
        check_trackers(("tensorboard", "wandb"))


class Fragile:
    """A tracker that fails at its second line."""

    def __init__(self, folder: RunFolder, config: RunConfig):
        if os.environ.get("FRAGILE") == "offline":
            raise ConnectionError("no way to the server\nat all")
        self.lines = 0

    def write(self, step: int, seconds: float, scalars: dict[str, float]) -> None:
        self.lines += 1
        if self.lines > 1:
            raise ConnectionError("lost\nin the wires")

    def close(self, failed: bool) -> None:
        raise AssertionError("it is closed no more")


def test_a_tracker_that_fails_ends_no_run_unless_it_never_begins(make_config, monkeypatch) -> None:
    monkeypatch.setattr(loggers, "_TRACKERS", {"mlflow": Fragile})
    monkeypatch.setattr(loggers, "find_spec", lambda name: name)
    config = make_config(train={"log_to": ("mlflow",)})
    folder, said = RunFolder(config.output), []
    folder.create(config)
    with (
        open_trackers(folder, config, said.append) as trackers,
        MetricsLog(folder, None, 4, trackers=trackers) as log,
    ):
        for step in range(1, 5):
            log.write(step, {"train/loss": float(step)})
    assert said == [
        "train.log_to: mlflow failed (lost); it gets no more of this run, metrics.jsonl gets all"
    ]
    assert [line["train/loss"] for line in folder.logged()] == [1, 2, 3, 4]

    monkeypatch.setenv("FRAGILE", "offline")
    with (
        pytest.raises(InputError, match="log_to: mlflow cannot begin: no way to the server$"),
        open_trackers(folder, config, said.append),
    ):
        pass
