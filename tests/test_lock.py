"""A lock is one holder's, and goes with its process."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esft_jax import lock
from esft_jax.config import RunConfig
from esft_jax.errors import InputError
from esft_jax.training.run_folder import RunFolder

# Owns a run folder until it is killed.
HOLDER = """
import sys, time
from esft_jax.training.run_folder import RunFolder

with RunFolder(sys.argv[1]).owned():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_owned_by_one_process_until_it_ends(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=r"output: .*run: another process works"), run.owned():
            pass
        holder.kill()
    refused = pytest.raises(InputError, match="another process")
    with run.owned(), run.owned(), refused, RunFolder(run.path).owned():  # `run` may own it twice
        pass
    with RunFolder(run.path).owned():
        pass


def test_hidden_files_are_nobodys(tmp_path: Path) -> None:
    (tmp_path / ".DS_Store").touch()
    with RunFolder(tmp_path).owned():
        pass
    config = RunConfig(model="m", output=str(tmp_path), data={"train": ("t.jsonl",)})
    RunFolder(tmp_path).check(config)
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="holds no run"):
        RunFolder(tmp_path).check(config)


def test_what_cannot_be_locked_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder").mkdir()
    for name in ("fifo", "link", "folder"):
        with (
            pytest.raises(InputError, match=f"{name}: cannot be locked"),
            lock.locked(tmp_path / name),
        ):
            pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch) -> None:
    def refuse(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    message = r"\.lock: its file system knows no locks \(Function not implemented\)"
    with pytest.warns(UserWarning, match=message), RunFolder(tmp_path).owned():
        pass
    with pytest.raises(InputError, match="knows no locks"), lock.locked(tmp_path / "claim"):
        pass
