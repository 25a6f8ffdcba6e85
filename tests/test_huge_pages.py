import os
import subprocess
import sys
from pathlib import Path

import pytest

from esft_jax import huge_pages
from esft_jax.huge_pages import restart_with_huge_pages

NAME = "GLIBC_TUNABLES"


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple]:
    """What `os.execve` was called with, on a system that gives huge pages to those who ask."""
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    monkeypatch.setattr(huge_pages, "_SYSTEM", tmp_path / "enabled")
    monkeypatch.delenv(NAME, raising=False)
    calls: list[tuple] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: calls.append(arguments))
    return calls


def test_other_tunables_are_kept(restarts: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NAME, "glibc.malloc.check=1")
    restart_with_huge_pages()
    assert restarts[0][2][NAME] == "glibc.malloc.check=1:glibc.malloc.hugetlb=1"


def test_what_the_user_says_of_huge_pages_holds(
    restarts: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(NAME, "glibc.malloc.hugetlb=0")
    restart_with_huge_pages()
    assert not restarts


@pytest.mark.parametrize("system", ["[always] madvise never\n", "always madvise [never]\n", None])
def test_no_restart_where_asking_changes_nothing(restarts: list, system: str | None) -> None:
    if system is None:
        huge_pages._SYSTEM.unlink()
    else:
        huge_pages._SYSTEM.write_text(system)
    restart_with_huge_pages()
    assert not restarts


def test_the_same_command_runs_once_more(tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    (tmp_path / "program.py").write_text(f"""
import os, sys
from pathlib import Path
from esft_jax import huge_pages
huge_pages._SYSTEM = Path({str(tmp_path / "enabled")!r})
print("start", os.getpid(), flush=True)
huge_pages.restart_with_huge_pages()
print("work", os.getpid(), sys.argv[1:], os.environ["{NAME}"])
""")
    environment = {key: value for key, value in os.environ.items() if key != NAME}
    result = subprocess.run(
        [sys.executable, tmp_path / "program.py", "a b", "--c"],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    first, second, work = result.stdout.splitlines()
    pid = first.split()[1]
    assert second == first
    assert work == f"work {pid} ['a b', '--c'] glibc.malloc.hugetlb=1"
