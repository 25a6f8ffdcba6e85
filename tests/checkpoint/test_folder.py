"""New folders: complete or as before, whatever is killed or fails on the way."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esft_jax.checkpoint.folder import new_folder
from esft_jax.errors import InputError

KILLED = """
import os, sys
from pathlib import Path
from esft_jax.checkpoint.folder import new_folder

rename, left = os.rename, int(sys.argv[2])

def count(*args):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    rename(*args)

with new_folder(Path(sys.argv[1]), replace=True) as folder:
    (folder / "killed.safetensors").touch()
    os.rename = os.replace = count
"""


def kill(target, renames):
    """A writer that ends so suddenly that it cleans nothing up, after some renames."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(target), str(renames)])
    assert done.returncode == 9


def write(target, name):
    with new_folder(target, replace=True) as folder:
        (folder / f"{name}.safetensors").touch()


def fail(target):
    with pytest.raises(KeyboardInterrupt), new_folder(target, replace=True):
        raise KeyboardInterrupt


def fail_with(code):
    def fail(*args):
        raise OSError(code, os.strerror(code))

    return fail


def names(folder):
    return sorted(path.name.removesuffix(".safetensors") for path in folder.iterdir())


@pytest.fixture
def target(tmp_path):
    return tmp_path / "run" / "adapter"


def test_what_killed_writers_left_is_removed(target):
    kill(target, 0)
    kill(target, 0)
    kill(target.with_name("adapter.v2"), 0)
    (other,) = (name for name in names(target.parent) if ".v2." in name)
    write(target, "new")
    assert names(target) == ["new"]
    assert names(target.parent) == [other, "adapter"]


def test_killed_between_old_and_new(target):
    write(target, "old")
    kill(target, 1)
    assert not target.exists()
    fail(target)
    assert names(target) == ["old"]
    kill(target, 1)
    write(target, "new")
    assert names(target) == ["new"]
    assert names(target.parent) == ["adapter"]


def test_killed_with_the_new_one_in_place(target, monkeypatch):
    write(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *args, **options: None)
        write(target, "new")
    assert len(names(target.parent)) > 1
    write(target, "newer")
    assert names(target) == ["newer"]
    assert names(target.parent) == ["adapter"]


def test_an_older_folder_stays_where_a_new_one_cannot_be_placed(target, monkeypatch):
    write(target, "old")
    rename = Path.rename

    def refuse(self, to):
        if (self / "new.safetensors").exists() and to == target:
            fail_with(errno.EACCES)()
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match="adapter: cannot be written: Permission denied"):
        write(target, "new")
    assert names(target) == ["old"]
    assert names(target.parent) == ["adapter"]


def test_a_full_disk_is_one_line(target):
    full = pytest.raises(InputError, match="adapter: cannot be written: No space left on device")
    with full, new_folder(target):
        fail_with(errno.ENOSPC)()
    assert names(target.parent) == []


def test_a_mount_point_is_refused_before_anything_is_written(target, monkeypatch):
    target.mkdir(parents=True)
    monkeypatch.setattr(Path, "rmdir", fail_with(errno.EBUSY))
    with pytest.raises(InputError, match="adapter: cannot be replaced"), new_folder(target):
        pytest.fail("a folder to write")


def test_the_current_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"\.: is the current folder"), new_folder(Path(".")):
        pytest.fail("a folder to write")
    assert tmp_path.is_dir()


def test_of_two_writers_the_later_one_wins(target):
    write(target, "old")
    refused = pytest.raises(InputError, match="adapter: another process writes it")
    with refused, new_folder(target, replace=True) as first:
        (first / "first.safetensors").touch()
        write(target, "second")
    assert names(target) == ["second"]
    assert names(target.parent) == ["adapter"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_link_is_never_followed(target, replace):
    write(target.with_name("other"), "model")
    target.symlink_to("other")
    refused = pytest.raises(InputError, match="adapter: is a link; expected a new folder")
    with refused, new_folder(target, replace=replace):
        pytest.fail("a folder to write")
    assert names(target.with_name("other")) == ["model"] and target.is_symlink()


@pytest.mark.parametrize("name", ["thesis.tex", "a.safetensors/", "expert_cfg.json.txt"])
def test_only_an_older_result_gives_way(target, name):
    write(target, "model")
    (target / name).mkdir() if name.endswith("/") else (target / name).touch()
    refused = pytest.raises(InputError, match=f"adapter/{name.strip('/')}: is no part of a result")
    with refused, new_folder(target, replace=True):
        pytest.fail("a folder to write")
    assert len(names(target)) == 2


def test_what_appears_meanwhile_is_not_replaced(target):
    with pytest.raises(InputError, match="adapter: exists"), new_folder(target) as folder:
        (folder / "model.safetensors").touch()
        target.mkdir()
        (target / "model.safetensors").write_text("another")
    assert (target / "model.safetensors").read_text() == "another"


@pytest.mark.parametrize("replace", [False, True])
def test_hidden_files_are_in_nobodys_way_and_stay(target, replace):
    (target / ".git").mkdir(parents=True)
    (target / ".DS_Store").touch()
    with new_folder(target, replace=replace) as folder:
        (folder / "model.safetensors").touch()
    assert names(target) == [".DS_Store", ".git", "model"]
