"""Runs that are killed, stopped or preempted; disks that are full, read-only or lose bits."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from esft_jax.checkpoint.load import open_source
from esft_jax.convert import main as convert
from esft_jax.errors import InputError
from esft_jax.train import main as train

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "crash.py"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KILL", "TERM"])
def test_a_run_killed_at_any_moment_ends_as_if_it_were_not(name: str, short_run: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--config", str(short_run), "--kills", "4"]
    command += ["--signal", name, "train.steps=60", "train.save_every=2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ": 2 times at random moments, 2 times while saving" in result.stdout


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no mount")
    if mounted.returncode:
        pytest.skip(f"a full disk needs the right to mount one: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_a_conversion_which_then_goes_on(
    base: Path, small_disk: Path, capsys: pytest.CaptureFixture
) -> None:
    target = small_disk / "converted"
    command = ["--from", str(base), "--to", str(target)]
    assert convert(command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {target}") and "No space left on device" in error
    assert error.count("\n") == 1
    with pytest.raises(InputError, match="unfinished conversion"):
        open_source(target)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    assert convert(command) == 0
    assert open_source(target).fingerprint == open_source(base).fingerprint


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    short_run: Path, small_disk: Path
) -> None:
    output = small_disk / "run"
    command = [sys.executable, "-m", "esft_jax.train", "--config", str(short_run)]
    command += [f"output={output}", "train.save_every=2"]

    def again() -> subprocess.CompletedProcess:
        return subprocess.run(command, capture_output=True, text=True)

    def complete() -> list[int]:
        last = output / "checkpoints" / "last"
        return sorted(int(p.name) for p in last.iterdir() if p.name.isdigit())

    # First let it save a few times, then fill the disk.
    stopped = subprocess.run([*command, "train.steps=4"], capture_output=True, text=True)
    assert stopped.returncode == 0, stopped.stderr
    ballast = small_disk / "ballast"
    try:
        with ballast.open("wb") as file:
            while True:
                file.write(bytes(1024))
                file.flush()
    except OSError:
        pass
    before = complete()
    assert before[-1] == 4
    full = again()
    assert full.returncode == 2, full.stdout + full.stderr
    assert "No space left on device" in full.stderr.splitlines()[-1]
    assert complete() == before
    # There is room for some lines and events; then a thread that writes a checkpoint fails, too.
    with ballast.open("r+b") as file:
        file.truncate(ballast.stat().st_size - 24 * 1024)
    later = again()
    assert later.returncode == 2, later.stdout + later.stderr
    line = later.stderr.removesuffix("\n")
    assert "\n" not in line, line
    assert line.startswith(f"error: {output}") and "No space left on device" in line
    assert complete()[-1] >= before[-1]
    ballast.unlink()
    freed = again()
    assert freed.returncode == 0, freed.stdout + freed.stderr


def start(config: Path, output: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "esft_jax.train", "--config", str(config)]
    return subprocess.Popen(
        [*command, f"output={output}", *arguments],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def read_until(process: subprocess.Popen, text: str) -> None:
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return
    pytest.fail(f"the run ended without {text!r}: {seen}")


@pytest.mark.parametrize(
    "stage", ["train: ", pytest.param("trained parameters: ", marks=pytest.mark.slow)]
)
def test_sigterm_before_training_ends_at_once_and_well(
    stage: str, short_run: Path, tmp_path: Path
) -> None:
    """While weights are loaded and experts scored; and between compiling and the first step."""
    process = start(short_run, tmp_path / "run", "train.steps=100000")
    read_until(process, stage)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0, rest
    assert "Stopped" in rest
    assert time.monotonic() - begin < 40
    assert not (tmp_path / "run" / "adapter").exists()


def test_ctrl_c_saves_and_a_second_run_in_the_folder_is_refused(
    short_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    output = tmp_path / "run"
    process = start(short_run, output, "train.steps=100000", "train.save_every=100000")
    read_until(process, "step 2 of")
    before = {path: path.stat().st_mtime_ns for path in (output / "config.yaml", output / "scores")}
    assert train(["--config", str(short_run), f"output={output}", "train.steps=9"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: output: {output}: another process works on this run")
    assert before == {path: path.stat().st_mtime_ns for path in before}
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130, rest
    assert "the same command continues the run" in rest and "Traceback" not in rest
    (saved,) = (output / "checkpoints" / "last").iterdir()
    assert int(saved.name) >= 2
    assert not (output / "adapter").exists()


@pytest.mark.parametrize("signals", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_before_training_is_no_success(
    signals: int, short_run: Path, tmp_path: Path
) -> None:
    """While weights are loaded, experts scored and programs compiled."""
    process = start(short_run, tmp_path / "run", "train.steps=100000")
    read_until(process, "train: ")
    for _ in range(signals):
        process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130, rest
    assert "Traceback" not in rest
    assert not (tmp_path / "run" / "adapter").exists()


class Metadata(BaseHTTPRequestHandler):
    """The metadata server of a VM that is preempted when `notice` is set."""

    notice = threading.Event()

    def do_GET(self) -> None:
        assert self.path.startswith("/computeMetadata/v1/instance/preempted")
        assert self.headers["Metadata-Flavor"] == "Google"
        if "wait_for_change=true" in self.path:
            self.notice.wait(60)
        content = b"TRUE" if self.notice.is_set() else b"FALSE"
        self.send_response(200)
        self.send_header("ETag", "1")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_preemption_notice_saves_and_ends_well(short_run: Path, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("localhost", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"localhost:{server.server_port}"
    output = tmp_path / "run"
    process = start(
        short_run,
        output,
        "train.steps=100000",
        "train.save_every=100000",
        "--preemption-notices",
        GCE_METADATA_HOST=host,
    )
    read_until(process, "step 8 of")
    Metadata.notice.set()
    rest = process.communicate(timeout=60)[0]
    server.shutdown()
    assert process.returncode == 0, rest
    assert "the same command continues the run" in rest
    (saved,) = (output / "checkpoints" / "last").iterdir()
    assert int(saved.name) >= 8


@pytest.mark.slow
def test_a_read_only_disk_ends_the_run_and_leaves_the_last_checkpoint(
    short_run: Path, small_disk: Path
) -> None:
    output = small_disk / "run"

    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(small_disk)], check=True)

    def complete() -> list[int]:
        last = output / "checkpoints" / "last"
        return sorted(int(p.name) for p in last.iterdir() if p.name.isdigit())

    finished = start(short_run, output, "train.steps=4", "train.save_every=2")
    text = finished.communicate()[0]
    assert finished.returncode == 0, text
    before = complete()
    assert before[-1] == 4
    remount("ro")
    try:
        process = start(short_run, output)
        text = process.communicate()[0]
    finally:
        remount("rw")
    assert process.returncode == 2, text
    assert text.splitlines()[-1].startswith("error: ") and str(small_disk) in text.splitlines()[-1]
    assert complete() == before
    again = start(short_run, output, "train.steps=6")
    text = again.communicate()[0]
    assert again.returncode == 0 and "\nstep 5 of 6" in text and "\nstep 4 of" not in text, text
