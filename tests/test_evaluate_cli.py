import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax import evaluate, generate
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import save_adapter, trained_names
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.decode.generation import generate_text, generate_tokens
from esft_jax.errors import InputError
from esft_jax.evaluation import load as evaluation
from esft_jax.evaluation.metrics import read_completions
from tests.checkpoint.checkpoints import save, torch_model

TOKENIZER = Path(__file__).parents[1] / "models" / "tiny-moe"
ROWS = [
    {"prompt": "2 + 2 =", "raw_answers": ["4"]},
    {"prompt": "User: 2 + 3 =\n\nAssistant:", "raw_answers": ["5", "five"]},
    {"prompt": "left out by the limit", "raw_answers": ["6"]},
]
CHAT = [{"role": "user", "content": "2 + 2 ="}, {"role": "assistant", "content": "4"}]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(torch_model(vocab_size=4096, num_hidden_layers=2), folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TOKENIZER / name, folder)
    return folder


@pytest.fixture
def config(model_folder, tmp_path):
    """A configuration, and the folder of its run."""
    task, chats = tmp_path / "eval.jsonl", tmp_path / "chats.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    chats.write_text(json.dumps({"messages": CHAT}) + "\n")
    path = tmp_path / "config.yaml"
    content = {
        "model": str(model_folder),
        "output": str(tmp_path / "run"),
        "dtype": "float32",
        "mesh": {"data": 1},
        "data": {"train": [str(chats)], "valid": [str(chats)], "sequence_length": 32},
        "evaluation": {"data": str(task), "max_new_tokens": 6, "batch_size": 2, "limit": 2},
    }
    path.write_text(json.dumps(content))  # JSON is YAML
    return path, tmp_path / "run"


@pytest.fixture
def adapter(model_folder, tmp_path):
    """Expert 3 of layer 1, trained to shout."""
    experts = ExpertConfig({1: (3,)})
    base = load_base(model_folder, jnp.float32)
    names = trained_names(base.source.config, experts, "")
    tensors = {name: 30 * base.source.tensor(name).astype(np.float32) for name in names}
    manifest = {"base_fingerprint": base.fingerprint}
    save_adapter(tmp_path / "adapter", tensors.items(), experts, manifest)
    return tmp_path / "adapter"


def only(run, pattern):
    (path,) = (run / "evaluation").glob(pattern)
    return path


def test_evaluates_the_base_and_an_adapter(config, adapter, capsys):
    path, run = config
    assert evaluate.main(["--config", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "exact_match, %" in printed
    assert "held-out loss, nats per token" in printed
    assert "change" not in printed  # nothing to compare with
    base = only(run, "base-*/task-*")
    assert f"written to {base.parent}" in printed
    completions = read_completions(base / "completions.jsonl")
    assert [completion.prompt for completion in completions] == [row["prompt"] for row in ROWS[:2]]
    assert completions[1].raw_answers == ("5", "five")
    scores = json.loads((base / "scores.json").read_text())
    assert (scores["metric"], scores["value"], scores["rows"]) == ("exact_match", 0.0, 2)
    assert scores["adapter"] is None
    assert len(scores["data_sha256"]) == 2
    assert scores["heldout"]["tokens"] > 1

    assert not list(run.rglob("comparison*"))

    assert evaluate.main(["--config", str(path), "--adapter", str(adapter)]) == 0
    printed = capsys.readouterr().out
    tuned = only(run, "adapter-*/task-*")
    tuned_scores = json.loads((tuned / "scores.json").read_text())
    assert tuned_scores["adapter"] == str(adapter)
    assert tuned_scores["heldout"]["nats_per_token"] != scores["heldout"]["nats_per_token"]
    assert len(read_completions(tuned / "completions.jsonl")) == 2
    assert json.loads((base / "scores.json").read_text()) == scores

    comparison = json.loads(only(run, "comparison-*.json").read_text())
    losses = [report["heldout"]["nats_per_token"] for report in (scores, tuned_scores)]
    (loss,) = (m for m in comparison["measures"] if "nats" in m["measure"])
    assert (loss["name"], loss["before"], loss["after"]) == ("task", *losses)
    assert f"{losses[0]:.4f}" in printed and f"{losses[1] - losses[0]:+.4f}" in printed
    # Figures of other settings are not set beside each other.
    arguments = ["--config", str(path), "--adapter", str(adapter), "evaluation.limit=1"]
    assert evaluate.main(arguments) == 0
    assert "change" not in capsys.readouterr().out


def test_the_result_of_full_training_does_not_replace_the_base(config, model_folder):
    path, run = config
    shutil.copytree(model_folder, run / "model")
    arguments = ["--config", str(path), f"model={run / 'model'}", "data.valid=[]"]
    assert evaluate.main(arguments) == 0
    scores = json.loads(only(run, "model-*/task-*/scores.json").read_text())
    assert scores["heldout"] is None
    assert not list(run.glob("evaluation/base-*"))


def test_what_is_lost_of_held_out_data_is_said(config, capsys):
    path, run = config
    chats = path.parent / "chats.jsonl"
    long = [CHAT[0] | {"content": "count " * 40}, CHAT[1]]
    rows = [{"messages": long}] * 2 + [{"messages": CHAT}]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--config", str(path), "evaluation.limit=1"]
    for too_long in ("cut", "drop"):
        assert evaluate.main([*arguments, f"data.too_long={too_long}"]) == 0
        printed = capsys.readouterr().out
        assert "held out, task: 1 of 3 examples in 1 rows of 32" in printed
        assert "with a loss, 2 dropped; read as messages\n" in printed
    found = [json.loads(p.read_text()) for p in run.glob("evaluation/base-*/task-*/scores.json")]
    assert sorted(scores["too_long"] for scores in found) == ["cut", "drop"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation.max_new_tokens=60"], "eval.jsonl:1: prompt: "),
        (["data.sequence_length=65"], "data.sequence_length: 65 tokens; the model's limit is 64"),
        (["evaluation.metric=intent", "evaluation.data=nowhere.jsonl"], "nowhere.jsonl: cannot"),
        (["mesh.expert=3"], "mesh"),
    ],
)
def test_bad_input_is_one_line_and_code_2(config, capsys, overrides, message):
    path, run = config
    assert evaluate.main(["--config", str(path), *overrides]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    # Whether the experts divide is known with the files, which the first line comes before.
    assert len(captured.out.splitlines()) == (message == "mesh")
    assert not run.exists()


def test_an_adapter_of_another_base_is_refused(config, adapter, capsys):
    path, run = config
    (adapter / "manifest.json").write_text('{"base_fingerprint": "0"}')
    assert evaluate.main(["--config", str(path), "--adapter", str(adapter)]) == 2
    assert "trained on another base" in capsys.readouterr().err
    assert not run.exists()


def test_generates_as_the_library_does(model_folder, capsys):
    arguments = ["--model", str(model_folder), "--prompt", "2 + 2 =", "--dtype", "float32"]
    options = ["--max-new-tokens", "6", "--temperature", "0.8", "--top-p", "0.9", "--seed", "5"]
    assert generate.main([*arguments, *options, "--raw"]) == 0
    tokenizer = Tokenizer.load(model_folder)
    (expected,) = generate_text(
        load_model(model_folder),
        tokenizer,
        ["2 + 2 ="],
        raw=True,
        max_new_tokens=6,
        temperature=0.8,
        top_p=0.9,
        seed=5,
    )
    assert capsys.readouterr().out == expected + "\n"


def test_generates_for_a_rendered_prompt_up_to_any_stop_token(model_folder, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)

    def generated(prompt):
        options = ["--max-new-tokens", "6", "--dtype", "float32"]
        assert generate.main(["--model", str(model), "--prompt", prompt, *options]) == 0
        return capsys.readouterr().out

    whole = generated("2 + 2 =")
    assert generated("User: 2 + 2 =\n\nAssistant: ") == whole
    tokenizer = Tokenizer.load(model)
    (ids,) = generate_tokens(
        load_model(model),
        [tokenizer.encode_user("2 + 2 =")],
        stop_ids=tokenizer.stop_ids,
        max_new_tokens=6,
    )
    assert tokenizer.decode(ids) + "\n" == whole
    stop = next(number for number in range(1, 6) if ids[number] not in ids[:number])
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, ids[stop]]}))
    assert generated("2 + 2 =") == tokenizer.decode(ids[:stop]) + "\n"


def test_generates_for_each_prompt_of_a_file(model_folder, adapter, tmp_path, capsys):
    texts = ["2 + 2 =", "a é", "2 + 3 ="]
    arguments = ["--model", str(model_folder), "--adapter", str(adapter), "--max-new-tokens", "6"]
    arguments += ["--quantise", "experts=int8"]
    expected = []
    for text in texts:
        assert generate.main([*arguments, "--prompt", text]) == 0
        expected.append({"prompt": text, "completion": capsys.readouterr().out.removesuffix("\n")})
    lines, rows = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    lines.write_text("\n\n".join(texts), encoding="utf-8")
    rows.write_text("".join(json.dumps({"id": 1, "prompt": text}) + "\n" for text in texts))
    assert generate.main([*arguments, "--prompts", str(lines), "--batch-size", "2"]) == 0
    found = capsys.readouterr().out
    assert list(map(json.loads, found.splitlines())) == expected
    written = tmp_path / "new" / "completions.jsonl"
    assert generate.main([*arguments, "--prompts", str(rows), "--output", str(written)]) == 0
    assert written.read_text(encoding="utf-8") == found
    assert capsys.readouterr().out == f"3 completions written to {written}\n"


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ('{"text": "a"}\n', (), "prompts.jsonl:1: prompt: missing; expected"),
        ('{"prompt": 2}\n', (), "prompts.jsonl:1: prompt: is 2; expected a string"),
        ('{"prompt": "a"}\n{"prompt": "b"}\n', ("--max-new-tokens=60",), "prompts.jsonl:1: "),
        ("", (), "prompts.jsonl: holds no examples"),
        ('{"prompt": "a"}\n', ("--prompt=a",), "--prompt: not allowed with argument --prompts"),
        (
            '{"prompt": "a"}\n',
            ("--quantise=experts=int3",),
            "--quantise: experts: expected 'none', 'int8'",
        ),
    ],
)
def test_a_file_of_prompts_that_is_wrong_is_named(
    model_folder, tmp_path, capsys, content, options, message
):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    assert generate.main(["--model", str(model_folder), "--prompts", str(path), *options]) == 2
    assert message in capsys.readouterr().err


def test_several_adapters_are_evaluated_as_each_alone(config, adapter, model_folder, capsys):
    path, run = config
    other = adapter.with_name("other")
    base, experts = load_base(model_folder, jnp.float32), ExpertConfig({1: (1, 2)})
    names = trained_names(base.source.config, experts, "")
    tensors = {name: -20 * base.source.tensor(name).astype(np.float32) for name in names}
    save_adapter(other, tensors.items(), experts, {"base_fingerprint": base.fingerprint})
    both = ["--adapter", str(adapter), "--adapter", str(other)]
    assert evaluate.main(["--config", str(path), *both]) == 0
    out = capsys.readouterr().out
    assert f"{adapter}:" in out and f"{other}:" in out

    def scores():
        found = (json.loads(p.read_text()) for p in run.glob("evaluation/adapter-*/task-*/*.json"))
        return {each.pop("adapter"): each for each in found if each.pop("seconds")}

    together = scores()
    assert together.keys() == {str(adapter), str(other)}
    losses = {each["heldout"]["nats_per_token"] for each in together.values()}
    assert len(losses) == 2
    shutil.rmtree(run / "evaluation")
    for each in (adapter, other):
        assert evaluate.main(["--config", str(path), "--adapter", str(each)]) == 0
    alone = scores()
    for name, score in together.items():
        loss = score.pop("heldout"), alone[name].pop("heldout")
        assert loss[0]["nats_per_token"] == pytest.approx(loss[1]["nats_per_token"], rel=1e-5)
        assert score == alone[name]
    assert evaluate.main(["--config", str(path), *both[:2], *both[:2]]) == 2
    assert "--adapter: one is given twice" in capsys.readouterr().err


@pytest.fixture
def dtypes(monkeypatch):
    """The types that models are loaded in; none is."""
    found = []

    class Loaded(Exception):
        pass

    def load(path, dtype, *_):
        found.append(jnp.dtype(dtype).name)
        raise Loaded

    monkeypatch.setattr(evaluation, "load_base", load)

    def of(model, adapter, dtype=None):
        with pytest.raises(Loaded):
            evaluation.load_tuned(model, adapter, dtype, None)
        return found[-1]

    return of


def test_answers_in_the_type_of_the_run(model_folder, adapter, tmp_path, dtypes):
    manifest = json.loads((adapter / "manifest.json").read_text())

    def say(**content):
        (adapter / "manifest.json").write_text(json.dumps(manifest | content))

    half = shutil.copytree(model_folder, tmp_path / "half")
    raw = json.loads((half / "config.json").read_text())
    del raw["dtype"]
    for named, expected in (("bfloat16", "bfloat16"), ("float16", "bfloat16"), ("float32",) * 2):
        (half / "config.json").write_text(json.dumps(raw | {"torch_dtype": named}))
        assert dtypes(half, None) == expected
    assert dtypes(model_folder, None) == "float32"
    assert dtypes(model_folder, None, "bfloat16") == "bfloat16"
    assert dtypes(model_folder, adapter) == "float32"  # as its tensors are stored
    say(dtype="bfloat16")
    assert dtypes(model_folder, adapter) == "bfloat16"
    assert dtypes(model_folder, adapter, "float32") == "float32"
    (half / "config.json").write_text(json.dumps(raw | {"torch_dtype": "bfloat16"}))
    say(dtype="float32")
    assert dtypes(half, adapter) == "float32"
    say(dtype="float64")
    with pytest.raises(InputError, match="manifest.json: dtype: is 'float64'; expected float32"):
        dtypes(half, adapter)


def test_evaluate_says_that_the_adapter_was_trained_in_another_type(config, adapter, capsys):
    arguments = ["--config", str(config[0]), "--adapter", str(adapter), "data.valid=[]"]
    assert evaluate.main(arguments) == 0
    assert "dtype" not in capsys.readouterr().out
    assert evaluate.main([*arguments, "dtype=bfloat16"]) == 0
    said = "dtype: evaluated in bfloat16; the adapter's run had float32"
    assert said in capsys.readouterr().out


def test_generate_refuses_what_does_not_fit(model_folder, adapter, capsys, monkeypatch):
    arguments = ["--model", str(model_folder), "--prompt", "a", "--max-new-tokens", "8"]

    def refused(*options):
        assert generate.main([*arguments, *options]) == 2
        return capsys.readouterr().err

    (adapter / "manifest.json").write_text('{"base_fingerprint": "0"}')
    assert "trained on another base" in refused("--adapter", str(adapter))
    # The rest is seen without reading weights.
    monkeypatch.setattr(evaluation, "load_base", lambda *args: 1 / 0)
    assert "prompt: 11 tokens and 64 new ones; the model's" in refused("--max-new-tokens=64")
    assert "--top-p: expected greater than 0" in refused("--top-p=0")
    ExpertConfig({1: (4,)}).save(adapter / "expert_cfg.json")
    assert "is missing; expert_cfg.json names it" in refused("--adapter", str(adapter))


def test_an_adapter_is_asked_as_it_was_trained(config, adapter, model_folder, capsys):
    manifest = json.loads((adapter / "manifest.json").read_text())
    chat = {"template": "{{ messages[-1].content }}{{ end }}", "arguments": {"end": "!"}}
    (adapter / "manifest.json").write_text(json.dumps(manifest | {"chat": chat}))
    arguments = ["--config", str(config[0]), "--adapter", str(adapter), "data.valid=[]"]
    assert evaluate.main(arguments) == 2
    assert capsys.readouterr().err.startswith("error: data.chat_template: is None; ")
    template = config[0].with_name("own.jinja")
    template.write_text(chat["template"])
    own = [*arguments, f"data.chat_template={template}"]
    assert evaluate.main([*own, "data.template_arguments.end='?'"]) == 2
    assert "data.template_arguments: is {'end': '?'}; " in capsys.readouterr().err

    def generated(text, *options):
        command = ["--model", str(model_folder), "--adapter", str(adapter), "--prompt", text]
        assert generate.main([*command, "--max-new-tokens", "4", *options]) == 0
        return capsys.readouterr().out

    whole = generated("2 + 2 =!", "--template-arguments", '{"end": ""}')
    assert generated("2 + 2 =") == whole
    template.write_text("{{ messages[-1].content }}{{ end }}" * 2)
    assert generated("1", "--chat-template", str(template)) == generated("1!1")
    assert (
        generate.main(["--model", str(model_folder), "--prompt", "a", "--template-arguments", "[]"])
        == 2
    )
    assert "--template-arguments: is []" in capsys.readouterr().err
