"""The cells of a sweep, and what is wrong with one before anything runs."""

import json
from pathlib import Path

import pytest

from esft_jax.errors import InputError
from esft_jax.sweeping.config import (
    Cell,
    all_cells,
    base_cells,
    config_sha256,
    load_sweep,
    run_config,
    search_cells,
)


def test_cells(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    base = [cell.name for cell in base_cells(sweep)]
    assert base == ["intent/base/seed-3", "licence/base/seed-3"]
    searched = [cell.name for cell in search_cells(sweep)]
    assert searched == [
        "intent/token/seed-3",
        "licence/token/seed-3",
        "intent/full/lr-1e-05/seed-3",
        "licence/full/lr-1e-05/seed-3",
        "intent/full/lr-0.001/seed-3",
        "licence/full/lr-0.001/seed-3",
    ]
    assert len(list(all_cells(sweep))) == len({c.name for c in all_cells(sweep)}) == 12


def test_the_run_of_a_cell(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    token = run_config(sweep, Cell("intent", "token", None, 4))
    assert (token.seed, token.select.top_p, token.method) == (4, 0.3, "esft")
    assert (token.evaluation.metric, token.data.train) == ("intent", ("train.jsonl",))
    assert token.output == f"{sweep.output}/cells/intent/token/seed-4"
    full = run_config(sweep, Cell("licence", "full", 1e-5, 3))
    assert (full.method, full.optimizer.learning_rate) == ("full", 1e-5)
    assert (full.evaluation.metric, full.data.train) == ("exact_match", ("l.jsonl",))
    assert run_config(sweep, base_cells(sweep)[0]).evaluation.metric == "intent"


def test_what_all_cells_change(sweep_file: Path) -> None:
    content = json.loads(sweep_file.read_text())
    overrides = ["model=another", "train.steps=7", "evaluation.metric=bleu", "method=lora"]
    sweep_file.write_text(json.dumps(content | {"overrides": overrides}))
    sweep = load_sweep(sweep_file)
    base = run_config(sweep, base_cells(sweep)[0])
    full = run_config(sweep, Cell("intent", "full", 1e-5, 3))
    for config in (base, full):
        assert (config.model, config.train.steps) == ("another", 7)
        assert config.evaluation.metric == "intent", "a task comes after what all cells change"
    assert full.method == "full", "and a method after both"


def test_a_configuration_is_the_same_wherever_it_writes(sweep_file: Path) -> None:
    sweep = load_sweep(sweep_file)
    one = run_config(sweep, Cell("intent", "token", None, 4))
    sweep_file.write_text(sweep_file.read_text().replace("/sweep", "/elsewhere"))
    moved = run_config(load_sweep(sweep_file), Cell("intent", "token", None, 4))
    assert one.output != moved.output
    assert config_sha256(one) == config_sha256(moved)
    other = run_config(sweep, Cell("intent", "token", None, 3))
    assert config_sha256(one) != config_sha256(other)


def test_tasks_may_be_a_file_of_their_own(sweep_file: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.yaml"
    content = json.loads(sweep_file.read_text())
    tasks.write_text(json.dumps(content["tasks"]))
    written = load_sweep(sweep_file)
    sweep_file.write_text(json.dumps(content | {"tasks": str(tasks)}))
    assert load_sweep(sweep_file) == written
    tasks.write_text("[intent]")
    with pytest.raises(InputError, match=r"tasks\.yaml: expected a mapping"):
        load_sweep(sweep_file)


def test_what_a_configuration_leaves_at_its_default_does_not_tell_it_apart(
    sweep_file: Path,
) -> None:
    sweep = load_sweep(sweep_file)
    cell = Cell("intent", "full", 1e-5, 4)
    plain = run_config(sweep, cell)
    text = sweep_file.read_text()

    def full(*overrides: str) -> str:
        new = json.dumps(["method=full", *overrides])
        sweep_file.write_text(text.replace('["method=full"]', new))
        return config_sha256(run_config(load_sweep(sweep_file), cell))

    same = config_sha256(plain)
    assert full("train.remat=none", f"optimizer.beta1={plain.optimizer.beta1}") == same
    assert full("data.mix={more: {train: [m.jsonl], weight: 1.0}}") == full(
        "data.mix={more: {train: [m.jsonl]}}"
    )
    assert full("train.remat=dots") != same


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('"full": ["method=full"]', '"full": ["method=ful"]', "cell intent/full/lr-1e-05/seed-3"),
        ('{"full": [1e-05', '{"ful": [1e-05', "learning_rates.ful: no such method"),
        ("[3, 4]", "[3, 3]", "seeds: one is named twice"),
        ("[3, 4]", "[]", "seeds: expected at least one item"),
        ("[1e-05, 0.001]", "[1e-05, 1.0000001e-5]", "learning_rates.full: two are the same in six"),
        ("method=full", "optimizer.learning_rate=1", "methods.full: optimizer.learning_rate is am"),
        ("method=full", "seed=5", "methods.full: seed is what the sweep sets; expected its seeds"),
        ("data.train=[l.jsonl]", "output=x", "tasks.licence: output is what the sweep sets"),
        ('"token":', '"base":', "expected a name of at most 64 of a-z"),
        ('"token":', '"a/b":', "expected a name of at most 64 of a-z"),
        ('"seeds"', '"sedes"', "did you mean seeds?"),
        ("select.top_p=0.3", "data.valid=[]", "expected both"),
    ],
)
def test_mistakes_are_named(sweep_file: Path, before: str, after: str, message: str) -> None:
    text = sweep_file.read_text()
    assert before in text
    sweep_file.write_text(text.replace(before, after))
    with pytest.raises(InputError) as error:
        load_sweep(sweep_file)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_shipped_sweep_is_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    sweep = load_sweep("configs/paper/main.yaml")
    for task in sweep.tasks:
        config = run_config(sweep, Cell(task, "token", None, 0))
        for path in (*config.data.train, *config.data.valid, config.evaluation.data):
            assert path is not None and Path(path).parent.name == task and Path(path).is_file()
        others = config.evaluation.others.values()
        assert all(Path(path).is_file() for other in others for path in other.valid)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.metric=bleu", "methods.full: changes data.valid, its format or columns, or"),
        ("evaluation.others={a: {valid: [a.jsonl]}}", "methods.full: changes data.valid"),
        ("evaluation.limit=5", "methods.full: changes data.valid"),
        ("data.valid=[easier.jsonl]", "methods.full: changes data.valid"),
        ("mesh.cpu_devices=2", "full/lr-1e-05/seed-3: mesh.cpu_devices is 2, and None"),
    ],
)
def test_what_must_be_the_same_for_all_methods(
    sweep_file: Path, override: str, message: str
) -> None:
    content = json.loads(sweep_file.read_text())
    content["methods"]["full"].append(override)
    sweep_file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_sweep(sweep_file)
