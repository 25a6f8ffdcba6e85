"""Traces are made for the planned steps and those asked for, and no others.

In a process of its own: JAX's profiler also starts in the compilers for other hardware that tests
have loaded, where there is no such hardware.
"""

import gzip
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from esft_jax.train_config import TrainConfig
from esft_jax.training.profiler import Profiler
from esft_jax.training.signals import on_user_signal


def steps(profiler: Profiler, first: int, last: int) -> None:
    square = jax.jit(lambda x: x @ x)
    for number in range(first, last + 1):
        with profiler.step(number):
            result = square(jnp.ones((8, 8)))
        profiler.finish_step(result)


def make_traces(folder: Path) -> None:
    """Two planned steps, two on request, and a run that ends within a trace."""
    profiler = Profiler(folder / "run", TrainConfig(profile_step=2, profile_steps=2))
    with on_user_signal(profiler.request):
        steps(profiler, 1, 4)
        os.kill(os.getpid(), signal.SIGUSR1)
        steps(profiler, 5, 8)
    profiler.close()
    short = Profiler(folder / "short", TrainConfig(profile_step=1, profile_steps=5))
    steps(short, 1, 2)
    assert not traces(folder / "short")
    short.close()
    Profiler(folder / "none", TrainConfig()).close()


def traces(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).parts[0]: gzip.decompress(path.read_bytes())
        for path in folder.rglob("*.trace.json.gz")
    }


def test_planned_and_requested_steps(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from tests.training.test_profiler import make_traces\n"
        f"make_traces(Path({str(tmp_path)!r}))\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = traces(tmp_path / "run")
    assert found.keys() == {"step-2", "step-5"}
    for name, numbers in {"step-2": (2, 3), "step-5": (5, 6)}.items():
        for number in range(1, 9):
            marked = f'"step_num":"{number}"'.encode() in found[name].replace(b" ", b"")
            assert marked == (number in numbers)
    assert traces(tmp_path / "short").keys() == {"step-1"}
    assert not (tmp_path / "none").exists()
