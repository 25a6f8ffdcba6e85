"""Tables of documents are those of the recorded runs."""

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from esft_jax.errors import InputError
from esft_jax.sweeping.config import BASE, Cell, config_sha256, load_sweep, run_config
from esft_jax.sweeping.record import CellResult, Record

DOCUMENT = """# Results
<!-- table: methods toy:base toy:token toy:unfinished -->
<!-- end -->
between
<!-- table: first_seed toy:all -->
<!-- end -->
<!-- table: domains toy:all -->
old
<!-- end -->
<!-- table: search toy:all -->
<!-- end -->
<!-- table: hours toy:all again:all -->
<!-- end -->
<!-- table: routing records/routing -->
<!-- end -->
<!-- table: step_cost records/cost.json -->
<!-- end -->
"""

HEAD = (
    "| method | learning rate | one | two | **average** | validation loss |"
    " forgotten, nats | experts | trained | stored | step memory |"
)

FILLED = f"""# Results
<!-- table: methods toy:base toy:token toy:unfinished -->
{HEAD}
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| base |  | 1.0 | 2.0 | **1.5** | 3.000 |  |  |  |  |  |
| token | 0.01 | 41.0 ± 1.4 | 60.0 ± 0.0 | **50.5 ± 0.7** | 1.000 ± 0.000 \
| 0.25 ± 0.00 | 7 | 12.5% | 4 MB | 1 GB |
<!-- end -->
between
<!-- table: first_seed toy:all -->
{HEAD}
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| token | 0.01 | 40.0 | 60.0 | **50.0** | 1.000 | 0.25 | 7 | 12.5% | 4 MB | 1 GB |
<!-- end -->
<!-- table: domains toy:all -->
| method | python | poetry |
| --- | ---: | ---: |
| base | 2.00 | 3.00 |
| token | 2.50 | 3.00 |
<!-- end -->
<!-- table: search toy:all -->
| method | learning rate | validation loss | average | forgotten, nats |
| --- | ---: | ---: | ---: | ---: |
| token | 0.01 | 1.000 | 50.0 | 0.25 |
| token | 0.02 | 2.000 | 30.0 | 0.75 |
| token | 0.04 | diverged |  |  |
<!-- end -->
<!-- table: hours toy:all again:all -->
| sweep | runs | hours of training |
| --- | ---: | ---: |
| toy | 8 | 4.0 |
| again | 8 | 4.0 |
| all | 16 | 8.0 |
<!-- end -->
<!-- table: routing records/routing -->
|  | one | two | three |
| --- | ---: | ---: | ---: |
| gate mass of a layer's top 2 | 30.0% | 50.0% | 60.0% |
| effective number of experts (entropy) | 6.0 | 4.0 | 3.0 |
| chosen experts | 5 | 4 | 4 |
| assignments served by them | 45.0% | 40.0% | 41.0% |
| tokens that meet at least one in a layer | 85% | 80% | 81% |
| shared top 2, two halves of the task | 1.50 | 2.00 | 1.00 |
| shared top 2 with the other tasks, mean (chance 0.50) | 0.75 | 0.25 | 0.50 |
<!-- end -->
<!-- table: step_cost records/cost.json -->
| method | trained | step | of full | memory | of full | stored | of full |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| full | 100.0% | 0.500 s | 100% | 400 MB | 100% | 40 MB | 100% |
| token | 12.5% | 0.250 s | 50% | 300 MB | 75% | 4 MB | 10% |
<!-- end -->
"""

LAYERS = """task,layer,experts,assignments_served,tokens_served,top_2_gate_share,\
effective_experts_entropy
one,1,2,0.4,0.8,0.2,7
one,2,3,0.5,0.9,0.4,5
two,1,2,0.4,0.8,0.4,5
two,2,2,0.4,0.8,0.6,3
three,1,2,0.41,0.81,0.6,3
three,2,2,0.41,0.81,0.6,3
"""

OVERLAP = """task,other,shared_top_k,chance
one,one,1.5,0.5
one,two,0.5,0.5
one,three,1,0.5
two,one,0.5,0.5
two,two,2,0.5
two,three,0,0.5
three,one,1,0.5
three,two,0,0.5
three,three,1,0.5
"""

COSTS = {
    "full": {
        "trained_share": 1.0,
        "step_seconds": 0.5,
        "step_bytes": 400_000_000,
        "stored_bytes": 40_000_000,
    },
    "token": {
        "trained_share": 0.125,
        "step_seconds": 0.25,
        "step_bytes": 300_000_000,
        "stored_bytes": 4_000_000,
    },
}


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A document beside a sweep of which one method is finished, and other records."""
    monkeypatch.chdir(tmp_path)
    run = {
        "model": "models/tiny-moe",
        "output": "unset",
        "data": {"train": ["t.jsonl"], "valid": ["v.jsonl"]},
        "evaluation": {"data": "e.jsonl"},
    }
    sweep = {
        "output": "records",
        "run": "configs/paper/run.yaml",
        "tasks": {"one": [], "two": []},
        "methods": {"token": [], "unfinished": ["method=full"]},
        "seeds": [0, 1],
        "learning_rates": {"token": [0.01, 0.02, 0.04]},
    }
    folder = tmp_path / "configs" / "paper"
    folder.mkdir(parents=True)
    (folder / "run.yaml").write_text(json.dumps(run))
    (folder / "toy.yaml").write_text(json.dumps(sweep))
    record, loaded = Record(Path("records") / "results.jsonl"), load_sweep(folder / "toy.yaml")

    def finish(
        cell: Cell, value: float | None, valid_loss: float | None, python_loss: float
    ) -> None:
        kept = {"python": python_loss, "poetry": 3.0}
        sha256 = config_sha256(run_config(loaded, cell))
        result = CellResult(cell, sha256, "chrf", value, valid_loss, kept)
        if cell.method != BASE:
            sizes = {"trained": 25, "total": 200, "stored_bytes": 4_000_000, "step_bytes": 10**9}
            result = replace(result, seconds=1800.0, experts=5 + 4 * (cell.task == "two"), **sizes)
        record.add(result)

    for task, before, values in (("one", 1, (40, 42)), ("two", 2, (60, 60))):
        finish(Cell(task, BASE, None, 0), before, 3, 2)
        for seed, value in enumerate(values):
            finish(Cell(task, "token", 0.01, seed), value, 1, 2.5)
        finish(Cell(task, "token", 0.02, 0), 30, 2, 3.5)
    finish(Cell("one", "token", 0.04, 0), 20, 3, 4.5)
    finish(Cell("two", "token", 0.04, 0), None, None, 4.5)
    (folder / "again.yaml").write_text(json.dumps(sweep | {"output": "again"}))
    shutil.copytree("records", "again")
    routing = Path("records") / "routing"
    routing.mkdir()
    (routing / "layers.csv").write_text(LAYERS)
    (routing / "overlap.csv").write_text(OVERLAP)
    Path("records/cost.json").write_text(json.dumps({"figures": COSTS}))
    path = tmp_path / "docs" / "results.md"
    path.parent.mkdir()
    path.write_text(DOCUMENT)
    return path


@pytest.fixture
def paper(script: Callable[[str], ModuleType]) -> ModuleType:
    module = script("paper")
    module.lines_of.cache_clear()
    module.sweep_of.cache_clear()
    return module


def test_tables_are_filled(document: Path, paper: ModuleType) -> None:
    assert paper.main(["--check"]) == 1
    assert document.read_text() == DOCUMENT
    assert paper.main([]) == 0
    assert document.read_text() == FILLED
    assert paper.main(["--check"]) == 0


def test_choices_of_experts_are_compared_seed_by_seed(document: Path, paper: ModuleType) -> None:
    """Both gain 2 points with the second seed, so their difference has no spread."""
    sweep = json.loads(Path("configs/paper/toy.yaml").read_text())
    methods = {"token": [], "taylor": ["select.method=gate_taylor"]}
    sweep |= {"output": "choices", "methods": methods, "learning_rates": {}}
    Path("configs/paper/choices.yaml").write_text(json.dumps(sweep))
    loaded = load_sweep("configs/paper/choices.yaml")
    results = Path("choices") / "results.jsonl"

    def finish(more: dict[str, int], trained: dict[str, int]) -> None:
        results.unlink(missing_ok=True)
        paper.lines_of.cache_clear()
        record = Record(results)
        for method, seed, task in itertools.product(more, (0, 1), ("one", "two")):
            if (method, seed) == (BASE, 1):
                continue
            cell = Cell(task, method, None, seed)
            sha256, kept = config_sha256(run_config(loaded, cell)), {"python": 2 + more[method] / 8}
            value = 40.0 + more[method] + 2 * seed + (task == "two")
            loss = 2 - more[method] / 20
            sizes = {"trained": trained[method], "total": 1000}
            record.add(CellResult(cell, sha256, "chrf", value, loss, kept, **sizes))

    document.write_text("<!-- table: choices choices:all -->\n<!-- end -->\n")
    more = {BASE: -10, "token": 0, "taylor": 5}
    finish(more, {BASE: 0, "token": 100, "taylor": 104})
    assert paper.main([]) == 0
    gained = "11.0 ± 1.4 | 11.0 ± 1.4 | **11.0 ± 1.4** | -0.500 ± 0.000 | 1.25 ± 0.00"
    more_than_that = "5.0 ± 0.0 | 5.0 ± 0.0 | **5.0 ± 0.0** | -0.250 ± 0.000 | 0.62 ± 0.00"
    assert document.read_text().splitlines()[3:-1] == [
        f"| token | 10.0% | {gained} |",
        f"| taylor | 10.4% | {more_than_that} |",
    ]
    finish(more, {BASE: 0, "token": 90, "taylor": 104})
    with pytest.raises(SystemExit, match="taylor trains 10.40%, token 9.00%; expected as many"):
        paper.main([])


def test_what_is_misspelt_is_not_taken_for_unfinished(document: Path, paper: ModuleType) -> None:
    document.write_text("<!-- table: methods toy:base toy:tokn -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="toy:tokn: no such method"):
        paper.main([])


def test_the_records_are_of_these_settings(document: Path, paper: ModuleType) -> None:
    config = Path("configs/paper/toy.yaml")
    config.write_text(config.read_text().replace('"token": []', '"token": ["select.top_p=0.9"]'))
    with pytest.raises(InputError, match="one/token/lr-0.01/seed-0 was run with other settings"):
        paper.main(["--check"])


def test_the_documents_tables_are_those_of_the_records(
    monkeypatch: pytest.MonkeyPatch, paper: ModuleType
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert paper.main(["--check"]) == 0
