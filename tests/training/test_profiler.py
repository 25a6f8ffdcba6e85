"""Traces are made for the planned steps and those asked for, and no others."""

import gzip
import os
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from esft_jax.config import TrainConfig
from esft_jax.training.profiler import Profiler
from esft_jax.training.signals import on_user_signal


@pytest.fixture(scope="module")
def square():
    return jax.jit(lambda x: x @ x)


def run(profiler: Profiler, square, first: int, last: int) -> None:
    for number in range(first, last + 1):
        with profiler.step(number):
            result = square(jnp.ones((8, 8)))
        profiler.finish_step(result)


def traces(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).parts[0]: gzip.decompress(path.read_bytes())
        for path in folder.rglob("*.trace.json.gz")
    }


def test_planned_and_requested_steps(tmp_path: Path, square) -> None:
    profiler = Profiler(tmp_path, TrainConfig(profile_step=2, profile_steps=2))
    with on_user_signal(profiler.request):
        run(profiler, square, 1, 4)
        assert traces(tmp_path).keys() == {"step-2"}
        os.kill(os.getpid(), signal.SIGUSR1)
        run(profiler, square, 5, 8)
    profiler.close()
    found = traces(tmp_path)
    assert found.keys() == {"step-2", "step-5"}
    for name, numbers in {"step-2": (2, 3), "step-5": (5, 6)}.items():
        for number in range(1, 9):
            marked = f'"step_num":"{number}"'.encode() in found[name].replace(b" ", b"")
            assert marked == (number in numbers)


def test_the_end_of_a_run_ends_its_trace(tmp_path: Path, square) -> None:
    profiler = Profiler(tmp_path, TrainConfig(profile_step=1, profile_steps=5))
    run(profiler, square, 1, 2)
    assert not traces(tmp_path)
    profiler.close()
    assert traces(tmp_path).keys() == {"step-1"}
    Profiler(tmp_path / "none", TrainConfig()).close()
    assert not (tmp_path / "none").exists()
