"""The notebooks: without outputs, by public names alone; the quickstart runs."""

import ast
import json
import os
import sys
from pathlib import Path

import pytest

import esft_jax

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path: Path) -> list[dict]:
    return [
        cell for cell in json.loads(path.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_and_calls_public_names(path: Path) -> None:
    program = []
    for cell in code_cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        program += [line for line in cell["source"] if line[:1] not in "!%"] + ["\n"]
    used = set()
    for node in ast.walk(ast.parse("".join(program))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            assert not [name for name in names if name.startswith("esft_jax.")]
            assert getattr(node, "module", "") != "esft_jax"
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "ej":
            used.add(node.attr)
    assert used
    assert used <= set(esft_jax.__all__)


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, which runs notebooks")
    pytest.importorskip("ipykernel", reason="needs ipykernel, which runs notebooks")
    import nbformat

    (path,) = [path for path in NOTEBOOKS if path.stem == "quickstart"]
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [
        cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())
    ]
    parameters.source = (
        'overrides = ["train.steps=3", "optimizer.warmup_steps=1", "score.samples=8",'
        '"train.log_every=1", "evaluation.limit=8", "evaluation.max_new_tokens=8", "mesh.data=1"]'
    )
    # `!esft` is the command of this environment.
    bin_folder = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", bin_folder + os.pathsep + os.environ["PATH"])
    nbclient.NotebookClient(
        notebook, resources={"metadata": {"path": str(tmp_path)}}, kernel_name="python3"
    ).execute()
    assert (tmp_path / "runs" / "quickstart" / "adapter").is_dir()
    printed = "".join(
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", ())
        if output.output_type == "stream"
    )
    assert " of 160 experts: " in printed
    assert " of 9,375,552 parameters trained in " in printed
