"""What other processes write, and where one may write."""

import os
from pathlib import Path

import pytest

from esft_jax import files
from esft_jax.errors import InputError


def test_a_file_of_another_host_is_waited_for(tmp_path: Path, monkeypatch) -> None:
    late = tmp_path / "late"
    monkeypatch.setattr(files.time, "sleep", lambda seconds: late.write_text(""))
    assert files.seen(late)
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    assert not files.seen(tmp_path / "nowhere" / "file")


def test_an_output_in_a_folder_that_cannot_be_searched(tmp_path: Path, monkeypatch) -> None:
    secret, stat = tmp_path / "secret", os.stat
    secret.mkdir()

    def refusing(path, *arguments, **options):
        if str(path).startswith(f"{secret}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refusing)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=f"^output: {secret}: no permission to write"):
        files.check_writable(secret / "new" / "run", "output")
