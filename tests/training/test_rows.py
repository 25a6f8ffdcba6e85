"""What a run reads: shares that are held out, formats of sources, steps by epochs."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from esft_jax.config import RunConfig, load_config
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.evaluation.run import check_evaluation
from esft_jax.training.rows import count_steps, describe_passes, held_out_rows, read_rows
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.setup import open_setup, own_run

EMBEDDED = Path(__file__).parents[2] / "models" / "tiny-moe"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(EMBEDDED)


@pytest.fixture
def config(chats: Path, tmp_path: Path):
    """A configuration of the forty chats; keyword arguments are its section `data`."""

    def make(train: dict[str, Any] | None = None, **data: Any) -> RunConfig:
        data = {"train": (str(chats),), "sequence_length": 32, "cache": None} | data
        output, score = str(tmp_path / "run"), {"sequence_length": 32}
        return RunConfig(str(EMBEDDED), output, data, train=train or {}, score=score)

    return make


def test_a_share_of_each_source_is_held_out(config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    other = tmp_path / "other.csv"
    other.write_text("problem,solution\n" + "".join(f"{n} and 1,{n + 1}\n" for n in range(10)))
    columns = {"question": "problem", "answer": "solution"}
    mix = {"sums": {"train": (str(other),), "valid": 0.2, "columns": columns}}
    data = config(valid=0.1, mix=mix).data
    task_set, train_set, valid_sets = read_rows(data, tokenizer, seed=0)
    examples = {name: dataset.stats.examples for name, dataset in valid_sets.items()}
    assert examples == {"task": 4, "sums": 2}
    assert (task_set.stats.examples, train_set.stats.examples) == (36, 44)
    sums = train_set.sources[1].dataset
    assert sums.describe().endswith(
        "; read as question_answer (question: problem, answer: solution)"
    )
    # Of the same records for another seed, and where evaluation reads them alone.
    again = read_rows(data, tokenizer, seed=1)[2]["task"]
    alone = held_out_rows(data, data, tokenizer, seed=0)
    for found in (again, alone):
        np.testing.assert_array_equal(found.documents.lines, valid_sets["task"].documents.lines)
    assert not set(task_set.documents.lines) & set(alone.documents.lines)


def test_evaluation_tells_shares_apart(config, tokenizer: Tokenizer, chats: Path) -> None:
    facts = []
    for valid in (0.1, 0.2, (str(chats),)):
        evaluation = {"data": str(chats), "max_new_tokens": 2}
        run = dataclasses.replace(config(valid=valid), evaluation=evaluation)
        facts.append(check_evaluation(run).tasks["task"].facts)
    assert [fact.get("valid_share") for fact in facts] == [0.1, 0.2, None]
    assert facts[0]["format"] == "messages"


@pytest.mark.parametrize(
    ("epochs", "batch_size", "expected"),
    [(1, 8, 5), (3, 8, 15), (1, 7, 6), (0.5, 8, 3), (2, 64, 2)],
)
def test_epochs_as_steps(
    config, tokenizer: Tokenizer, epochs: float, batch_size: int, expected: int
) -> None:
    run = config({"epochs": epochs, "batch_size": batch_size})
    _, train_set, _ = read_rows(run.data, tokenizer, run.seed)
    assert len(train_set) == 40
    counted = count_steps(run, train_set)
    assert (counted.train.steps, counted.train.epochs) == (expected, None)
    assert train_set.epochs(expected * batch_size)["epoch"] >= epochs
    assert count_steps(counted, train_set) is counted


def test_epochs_are_of_the_task(config, tokenizer: Tokenizer, chats: Path) -> None:
    run = config({"epochs": 2, "batch_size": 8}, mix={"a": {"train": (str(chats),), "weight": 3.0}})
    _, train_set, _ = read_rows(run.data, tokenizer, run.seed)
    counted = count_steps(run, train_set)
    assert counted.train.steps == 2 * 40 * 4 / 8
    line = describe_passes(counted, train_set)
    assert line == "40 updates of 8 rows: passes 2 over data.train, 6 over a"


def test_many_passes_are_warned_of(config, tokenizer: Tokenizer) -> None:
    run = config({"steps": 55, "batch_size": 8})
    _, train_set, _ = read_rows(run.data, tokenizer, run.seed)
    assert describe_passes(run, train_set).startswith(
        "55 updates of 8 rows: passes 11 over data.train; warning: data that are repeated"
    )
    few = dataclasses.replace(run, train=dataclasses.replace(run.train, steps=50))
    assert "warning" not in describe_passes(few, train_set)


def test_steps_and_epochs_exclude_each_other(config, tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"train.steps: 4 beside train.epochs = 2; expected one"):
        config({"steps": 4, "epochs": 2})
    run = dataclasses.replace(config({"epochs": 1}), optimizer={"warmup_steps": 9})
    _, train_set, _ = read_rows(run.data, tokenizer, run.seed)
    with pytest.raises(InputError, match=r"train.epochs: 1 are 2 steps; optimizer.warmup_steps: 9"):
        count_steps(run, train_set)


def test_a_run_by_epochs_is_continued(config) -> None:
    config = config({"epochs": 1, "batch_size": 8})
    setup = open_setup(config)
    steps = setup.config.train.steps
    assert steps == 5
    with own_run(setup):
        pass
    run = RunFolder(config.output)
    kept = load_config(run.config)
    assert (kept.train.steps, kept.train.epochs) == (steps, None)
    (run.last / str(steps)).mkdir(parents=True)
    for epochs in (1, 2):  # the same again, and on
        more = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=epochs))
        run.check(more)
        with own_run(open_setup(more)):
            pass
    less = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=0.01))
    with pytest.raises(InputError, match=f"has made {steps} updates"), own_run(open_setup(less)):
        pass


def test_a_run_of_an_older_version_is_continued(config) -> None:
    """Its configuration says what was the default: `format: chat`."""
    config = config()
    run = RunFolder(config.output)
    run.create(config)
    old = json.dumps("chat")
    text = run.config.read_text()
    assert "  format: null\n" in text
    run.config.write_text(text.replace("  format: null\n", f"  format: {old}\n"))
    assert load_config(run.config).data.format == "messages"
    run.check(config)
    texts = dataclasses.replace(config, data=dataclasses.replace(config.data, format="text"))
    with pytest.raises(InputError, match=r"holds a run with data.format = 'messages', not 'text'"):
        run.check(texts)
