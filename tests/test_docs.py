"""The pages that the site of the documentation generates."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pages() -> ModuleType:
    """The hook of MkDocs."""
    for package in ("mkdocs", "griffe"):
        pytest.importorskip(package, reason=f"needs {package}, of the extra docs")
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "site" / "pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_key_has_its_values_default_and_meaning(pages: ModuleType) -> None:
    table = pages.keys().splitlines()
    for row in (
        "| `output` | text | required | Folder of the run. |",
        "| `seed` | integer ≥ 0 | `0` | Seed of initialisation, shuffling and sampling. |",
        "| `learning_rate` | number > 0 | `1e-05` | Peak learning rate. |",
        "| `moments` | `float32`, `bfloat16` | `float32` | Type that moments are kept in between "
        "updates; computed in float32, and rounded to bfloat16 stochastically. |",
        "| `weight` | number > 0 | `1.0` | Packed rows of this source for each one of "
        "`data.train`. |",
        "| `mesh` | a section |  | Devices per mesh axis. |",
    ):
        assert row in table
    assert {"## The run", "## data.mix.NAME", "## evaluation.others.NAME"} <= set(table)
    rows = [re.split(r"(?<!\\) \| ", row.strip("| ")) for row in table if row.startswith("| `")]
    assert all(values and meaning for _, values, _, meaning in rows)


def test_every_public_name_has_a_place(pages: ModuleType) -> None:
    import esft_jax

    places = [line.split(".")[-1] for line in pages.names().splitlines() if line.startswith(":::")]
    assert sorted(places) == sorted(esft_jax.__all__)
