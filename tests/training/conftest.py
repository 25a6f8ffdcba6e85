"""Run configurations on the tiny base model."""

from pathlib import Path

import pytest

from esft_jax.config import RunConfig


@pytest.fixture
def make_config(base: Path, chats: Path, tmp_path: Path):
    """A run configuration of a few steps; keyword arguments replace top-level keys."""

    def make(**changes) -> RunConfig:
        values = {
            "model": str(base),
            "output": str(tmp_path / "run"),
            "dtype": "float32",
            "mesh": {"data": 2, "expert": 2},
            "data": {"train": (str(chats),), "valid": (str(chats),), "sequence_length": 64},
            "score": {"samples": 8, "sequence_length": 64, "batch_size": 4},
            "train": {
                "steps": 4,
                "batch_size": 4,
                "eval_every": 2,
                "save_every": 2,
                "log_every": 1,
            },
            "optimizer": {"learning_rate": 1e-3},
        }
        return RunConfig(**(values | changes))

    return make
