"""A run's evaluation: its own task and others, before and after training, kept and compared."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from esft_jax import evaluate, train
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.config import load_config
from esft_jax.data.chat_template import DEFAULT_TEMPLATE
from esft_jax.data.pipeline import build_dataset
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError, RunFailed
from esft_jax.evaluation import run as evaluation
from esft_jax.evaluation.judge import VARIABLES
from esft_jax.evaluation.metrics import read_completions
from esft_jax.evaluation.run import Score, check_evaluation, run_evaluation
from esft_jax.evaluation.tasks import EvaluationResult, HeldoutLoss, heldout_loss
from tests.evaluation.test_judge import KEY, Server

TEXTS = ["In the beginning was the word.", "def add(a, b):\n    return a + b\n"]


@pytest.fixture
def config(short_run: Path, chats: Path, tmp_path: Path) -> Path:
    """Two updates, a task of its own, and three others."""
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    rows = [{"prompt": f"{n} + 1 =", "raw_answers": [str(n + 1)]} for n in range(3)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    content = json.loads(short_run.read_text())
    content |= {"output": str(tmp_path / "run"), "mesh": {"data": 1}}
    content["train"] |= {"steps": 2, "eval_every": 2, "save_every": 2}
    content["optimizer"]["learning_rate"] = 0.02
    content["evaluation"] = {
        "data": str(tmp_path / "sums.jsonl"),
        "metric": "chrf",
        "max_new_tokens": 6,
        "batch_size": 8,
        "others": {
            "text": {"valid": [str(tmp_path / "text.jsonl")]},
            "chats": {"data": str(chats), "valid": [str(chats)]},
            "sums-short": {"data": str(tmp_path / "sums.jsonl"), "max_new_tokens": 2},
        },
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    return path


def folders(evaluation: Path, kind: str) -> dict[str, Path]:
    """Where the only evaluation of some weights lies, by the names of tasks and domains."""
    (weights,) = evaluation.glob(f"{kind}-*")
    found = {path.name.rpartition("-")[0]: path for path in weights.iterdir()}
    assert len(found) == len(list(weights.iterdir()))
    return found


def scores(evaluation: Path, kind: str) -> dict[str, Any]:
    return {
        name: json.loads((path / "scores.json").read_text())
        for name, path in folders(evaluation, kind).items()
    }


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_before_and_after_training(
    config: Path, base: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run" / "evaluation"
    assert train.main(["--config", str(config)]) == 0
    printed = capsys.readouterr().out
    before, after = scores(folder, "base"), scores(folder, "adapter")
    assert before.keys() == after.keys() == {"task", "text", "chats", "sums-short"}
    expected = []
    for name in ("task", "text", "chats"):
        old, new = before[name], after[name]
        if name != "text":
            expected.append([name, f"{old['metric']}, %", old["value"], new["value"]])
        for loss, unit in [
            ("nats_per_token", "held-out loss, nats per token"),
            ("bits_per_byte", "held-out bits per byte"),
        ]:
            if old["heldout"][loss] is not None:
                expected.append([name, unit, old["heldout"][loss], new["heldout"][loss]])
    assert [e[1] for e in expected].count("held-out bits per byte") == 1  # chats have no bytes
    old, new = before["sums-short"], after["sums-short"]
    assert old["heldout"] is None
    expected.append(["sums-short", "exact_match, %", old["value"], new["value"]])
    (path,) = folder.glob("comparison-*.json")
    assert f"comparison: {path}" in printed
    comparison = json.loads(path.read_text())
    base_folders, adapter_folders = folders(folder, "base"), folders(folder, "adapter")
    assert comparison["before"] == base_folders["task"].parent.name
    assert comparison["after"] == adapter_folders["task"].parent.name
    assert comparison["folders"] == {name: path.name for name, path in base_folders.items()}
    assert comparison["folders"] == {name: path.name for name, path in adapter_folders.items()}
    found = comparison["measures"]
    assert [[m["name"], m["measure"], m["before"], m["after"]] for m in found] == expected
    for measure in found:
        assert measure["change"] == measure["after"] - measure["before"]
        if "nats" in measure["measure"]:
            assert measure["change"] != 0
            assert f"{measure['change']:+.4f}" in printed
    assert "before" in printed and "after" in printed and "change" in printed

    # The same figures as without a run.
    tokenizer, heldout = Tokenizer.load(base), [str(tmp_path / "text.jsonl")]
    dataset = build_dataset(heldout, tokenizer, format="text", sequence_length=32)
    loss = heldout_loss(load_model(base), dataset, 8)
    assert before["text"]["heldout"]["nats_per_token"] == pytest.approx(loss.nats_per_token)
    assert before["text"]["heldout"]["bits_per_byte"] == pytest.approx(loss.bits_per_byte)
    completions = read_completions(base_folders["task"] / "completions.jsonl")
    short = read_completions(base_folders["sums-short"] / "completions.jsonl")
    assert len(completions) == len(short) == 3
    assert not (base_folders["text"] / "completions.jsonl").exists()

    # The same command evaluates nothing again, and says the same.
    def fail(*args: Any) -> Any:
        raise AssertionError("evaluated again")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_evaluate", fail)
        assert train.main(["--config", str(config)]) == 0
    assert json.loads(path.read_text()) == comparison

    # `evaluate` does, and knows what was before.
    path.unlink()
    adapter = tmp_path / "run" / "adapter"
    capsys.readouterr()
    assert evaluate.main(["--config", str(config), "--adapter", str(adapter)]) == 0
    assert "change" in capsys.readouterr().out
    assert json.loads(path.read_text()) == comparison

    # Another evaluation leaves all of this as it is; so does the run with other settings.
    kept = files(folder)
    other = shutil.copytree(adapter, tmp_path / "other")
    double(other)
    for command in (evaluate.main, train.main):
        assert command(["--config", str(config), "evaluation.limit=2"]) == 0
        assert kept.items() <= files(folder).items()
    arguments = ["--config", str(config), "--adapter", str(other)]
    assert evaluate.main(arguments) == 0
    assert kept.items() <= files(folder).items()
    assert len(list(folder.glob("adapter-*"))) == 2
    assert len(list(folder.glob("comparison-*"))) == 3


def double(adapter: Path) -> None:
    tensors = load_file(adapter / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, adapter / "model.safetensors")


@pytest.fixture
def done(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is evaluated; the scores themselves are made up."""
    names: list[str] = []
    completed = EvaluationResult("chrf", 50.0, 0, [])
    monkeypatch.setattr(evaluation, "evaluate_task", lambda *args, **options: completed)
    monkeypatch.setattr(evaluation, "heldout_loss", lambda *args: HeldoutLoss(9, 2.5, None))
    compute = evaluation._evaluate

    def note(*args: Any) -> Any:
        names.append(args[3])
        return compute(*args)

    monkeypatch.setattr(evaluation, "_evaluate", note)
    return names


def test_only_scores_of_the_same_settings_are_taken_over(
    config: Path, tmp_path: Path, done: list[str]
) -> None:
    def evaluated(*overrides: str) -> list[str]:
        done.clear()
        report = run_evaluation(load_config(config, overrides))
        assert report.scores["task"].value == 50.0
        assert report.scores["text"] == Score(None, None, 0, 0, HeldoutLoss(9, 2.5, None))
        return list(done)

    everything = ["task", "text", "chats", "sums-short"]
    assert evaluated() == everything
    assert evaluated() == []
    assert evaluated("evaluation.batch_size=3") == []
    assert evaluated("evaluation.max_new_tokens=5") == ["task", "chats"]
    same = ("evaluation.max_new_tokens=5", "evaluation.limit=2")
    assert evaluated(*same) == ["task", "chats", "sums-short"]
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('{"text": "More of it."}\n')
    assert evaluated(*same) == ["text"]
    # What was found before is still there.
    assert evaluated("evaluation.max_new_tokens=5") == []
    # A score that is half there is none: it is written last.
    for path in (tmp_path / "run" / "evaluation").glob("base-*/chats-*/scores.json"):
        path.unlink()
    assert evaluated(*same) == ["chats"]
    for path in (tmp_path / "run" / "evaluation").glob("base-*/chats-*/completions.jsonl"):
        path.unlink()
    assert evaluated(*same) == ["chats"]
    assert evaluated(*same, "dtype=bfloat16") == everything


def test_scores_depend_on_all_that_is_read(
    config: Path, base: Path, tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(base, tmp_path / "model")
    adapter = tmp_path / "lora" / "adapter_config.json"
    adapter.parent.mkdir()
    save_file({"a": np.zeros(2, np.float32)}, adapter.parent / "adapter_model.safetensors")
    loaded = load_base(model, "float32")
    monkeypatch.setattr(evaluation, "load_tuned", lambda *args: loaded)
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "1 2", "messages": chat}) + "\n")

    def evaluated(*overrides: str) -> list[str]:
        done.clear()
        text = "evaluation.others.text.format=text"
        overridden = load_config(config, [f"model={model}", text, *overrides])
        run_evaluation(overridden, adapter.parent)
        return list(done)

    adapter.write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    everything = evaluated()
    assert evaluated() == []
    assert evaluated("evaluation.others.text.format=messages") == ["text"]
    evaluated()
    adapter.write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 2}')
    assert evaluated() == everything
    (model / "chat_template.jinja").write_text("!" + DEFAULT_TEMPLATE)
    assert evaluated() == everything
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(shape | {"rms_norm_eps": 1e-3}))
    assert evaluated() == everything
    (model / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert evaluated() == everything
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps(settings | {"new": 1}))
    assert evaluated() == []  # it says nothing
    settings["add_bos_token"] = not settings.get("add_bos_token", False)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    assert evaluated() == everything


def test_an_adapter_that_is_missing_is_named(config: Path, tmp_path: Path, done: list[str]) -> None:
    (tmp_path / "run" / "evaluation" / "adapter-0").mkdir(parents=True)
    with pytest.raises(InputError, match="nowhere: no such folder; expected an adapter"):
        run_evaluation(load_config(config), "nowhere")


def test_an_evaluation_replaces_no_other_one(config: Path, tmp_path: Path, done: list[str]) -> None:
    """Whatever it is that differs."""
    folder = tmp_path / "run" / "evaluation"
    run_evaluation(load_config(config))
    kept = files(folder)
    rows = (tmp_path / "sums.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(rows + rows)
    for override in (
        "evaluation.limit=1",
        "evaluation.metric=exact_match",
        "evaluation.temperature=0.5",
        "evaluation.top_p=0.5",
        "evaluation.max_new_tokens=3",
        f"evaluation.data={tmp_path / 'more.jsonl'}",
        "evaluation.others.chats.data=null",
        "evaluation.others={}",
        "data.valid=[]",
        "data.sequence_length=64",
        "data.too_long=cut",
        "seed=1",
        "dtype=bfloat16",
    ):
        run_evaluation(load_config(config, [override]))
        assert kept.items() <= files(folder).items(), override
    before = files(folder)
    report = run_evaluation(load_config(config, ["evaluation.limit=1"]))
    assert report.kept == ("task", "text", "chats", "sums-short")
    assert files(folder) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ([], "expected a JSON object"),
        ({"value": "50"}, "value: is '50'; expected a valid number"),
        ({"value": float("nan")}, "value: is nan; expected a finite number"),
        ({"value": None}, "value: is None; expected one"),
        ({"rows": 2}, "rows: is 2, where the folder's name stands for 3"),
        ({"dtype": "bfloat16"}, "dtype: is 'bfloat16', where"),
        ({"failures": -1}, "failures: is -1; expected"),
        ({"heldout": None}, "heldout: is None; expected one"),
        ({"heldout": 5}, "heldout: is 5; expected an object"),
        ({"heldout": {"tokens": 9}}, "heldout.nats_per_token: "),
        (
            {"heldout": {"tokens": 9, "nats_per_token": float("inf"), "bits_per_byte": None}},
            "heldout.nats_per_token: is inf; expected a finite number",
        ),
    ],
)
def test_damaged_scores_are_named(
    config: Path, tmp_path: Path, done: list[str], change: Any, message: str
) -> None:
    run_evaluation(load_config(config))
    path = folders(tmp_path / "run" / "evaluation", "base")["task"] / "scores.json"
    content = change if change == [] else json.loads(path.read_text()) | change
    path.write_text(json.dumps(content))
    with pytest.raises(InputError) as caught:
        run_evaluation(load_config(config))
    assert str(caught.value).startswith(f"{path}: {message}")


def test_a_loss_that_is_not_finite_is_no_score(
    config: Path, tmp_path: Path, done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        evaluation, "heldout_loss", lambda *args: HeldoutLoss(9, float("nan"), None)
    )
    with pytest.raises(RunFailed, match="evaluation of task: the held-out loss is nan"):
        run_evaluation(load_config(config))
    assert not list(tmp_path.glob("run/evaluation/**/scores.json"))


def test_a_judge_scores_a_task(
    config: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--config", str(config), "evaluation.metric=judge_translation"]
    command += ["evaluation.others={}", "data.valid=[]"]
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert evaluate.main(command) == 2
    assert capsys.readouterr().err.startswith("error: OPENAI_BASE_URL: not set")
    assert not (tmp_path / "run").exists()

    server = Server()
    for name, value in zip(VARIABLES, (server.url, KEY, "grader"), strict=True):
        monkeypatch.setenv(name, value)

    def answer(body: dict[str, Any]) -> tuple[int, str]:
        first = json.loads(body["messages"][1]["content"])["prompt"] == "0 + 1 ="
        return 200, "What?" if first else "Score: 7"

    server.answer = answer
    assert evaluate.main(command) == 0
    printed = capsys.readouterr().out
    assert "judge_translation, %" in printed
    assert "no readable score for 1 of 3 completions" in printed
    folder = tmp_path / "run" / "evaluation"
    found = scores(folder, "base")["task"]
    assert (found["value"], found["failures"], found["judge"]) == (70.0, 1, "grader")
    completions = read_completions(folders(folder, "base")["task"] / "completions.jsonl")
    assert [completion.score for completion in completions] == [None, 0.7, 0.7]
    # Replies are kept in the run folder.
    assert evaluate.main(command) == 0
    assert len(server.requests) == 3
    server.http.shutdown()
    server.http.server_close()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("evaluation.others.text.metrik=chrf", "did you mean evaluation.others.text.metric?"),
        ("evaluation.others.text.valid=nowhere.jsonl", "evaluation.others.text.valid: expected"),
        ("evaluation.others.text.valid=[nowhere.jsonl]", "nowhere.jsonl: cannot be read"),
        ("evaluation.others.text={}", "others.text: nothing to evaluate; expected data or valid"),
        ("evaluation.others={task: {valid: [a]}}", "others.task: expected a name"),
        ("evaluation.others={a/b: {valid: [a]}}", "others.a/b: expected a name"),
        (f"evaluation.others={{{65 * 'a'}: {{valid: [a]}}}}", "expected a name of at most 60"),
        ("evaluation={data: EVAL, metric: bleu}", "EVAL: bleu: the longest answer has 1 tokens"),
        ("evaluation.others.text.data=nowhere.jsonl", "nowhere.jsonl: cannot be read"),
        ("evaluation.others.chats.metric=intent", "an answer is not JSON, which intent needs"),
    ],
)
def test_what_is_wrong_with_an_evaluation_is_named(
    config: Path, tmp_path: Path, override: str, message: str
) -> None:
    task = str(tmp_path / "sums.jsonl")
    with pytest.raises(InputError) as error:
        check_evaluation(load_config(config, [override.replace("EVAL", task)]))
    assert message.replace("EVAL", task) in str(error.value)


def test_a_configuration_without_anything_to_evaluate_is_refused(config: Path) -> None:
    with pytest.raises(InputError, match="evaluation.data: not set"):
        run_evaluation(load_config(config, ["evaluation={}"]))
