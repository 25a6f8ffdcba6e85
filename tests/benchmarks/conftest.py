import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Import a benchmark by name; its `main` will leave the cores of the test session alone."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        if hasattr(module, "pin"):
            monkeypatch.setattr(module, "pin", lambda threads: None)
        return module

    return load
