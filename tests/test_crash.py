"""Runs that are killed, and disks that are full."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "crash.py"


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_if_it_were_not(short_run: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--config", str(short_run), "--kills", "8"]
    command += ["train.steps=60", "train.save_every=2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 times while saving" in result.stdout


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


def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    short_run: Path, small_disk: Path
) -> None:
    output = small_disk / "run"
    command = [sys.executable, "-m", "esft_jax.train", "--config", str(short_run)]
    command += [f"output={output}", "train.save_every=2"]

    def train() -> subprocess.CompletedProcess:
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
    assert complete() == [4]
    full = train()
    assert full.returncode == 2, full.stdout + full.stderr
    assert "No space left on device" in full.stderr.splitlines()[-1]
    assert complete() == [4]
    ballast.unlink()
    again = train()
    assert again.returncode == 0, again.stdout + again.stderr
