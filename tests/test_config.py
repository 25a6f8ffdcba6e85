"""RunConfig and its YAML: what is read, what is written, and what is refused with which words."""

import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from esft_jax.config import RunConfig, load_config, save_config
from esft_jax.data.chat_template import ChatFormat
from esft_jax.data_config import DataConfig
from esft_jax.errors import InputError
from esft_jax.selection_config import SelectConfig

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL = """\
model: models/m
output: runs/r
data:
  train: [task.jsonl]
optimizer:
  learning_rate: 1e-4
"""
# Each line stands for ten times the values of the one before.
BOMB = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30)
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL)
    return path


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    text = str(caught.value)
    assert "\n" not in text
    return text.replace(str(path), "FILE")


def test_reads_values_and_defaults(file: Path) -> None:
    config = load_config(file)
    assert config.data.train == ("task.jsonl",)
    assert config.optimizer.learning_rate == 1e-4  # YAML 1.1 would read a string
    assert config.method == "esft"
    assert config.mesh.data == -1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]


def test_overrides_replace_values_and_sections(file: Path) -> None:
    overrides = ["seed=7", "train.steps=3", "train.micro_batches=4", "optimizer.clip_norm=2"]
    config = load_config(file, [*overrides, "data.train=[a, b=c]", "mesh={expert: 2}", "model=x"])
    assert (config.seed, config.train.steps, config.train.micro_batches) == (7, 3, 4)
    assert isinstance(config.optimizer.clip_norm, float)
    assert config.optimizer.learning_rate == 1e-4
    assert config.data.train == ("a", "b=c")
    assert config.mesh.expert == 2
    assert config.model == "x"


def test_paths_of_a_home_folder(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    overrides = ["model=~/m", "data.train=[~/a.jsonl, ./~]", "select.scores=['~/s']"]
    config = load_config(file, [*overrides, "evaluation.others.x.valid=[~/v]", 'output="~"'])
    assert (config.model, config.output) == ("/home/me/m", "/home/me")
    assert config.data.train == ("/home/me/a.jsonl", "./~")
    assert config.select.scores == ("/home/me/s",)
    assert config.evaluation.others["x"].valid == ("/home/me/v",)
    assert RunConfig(model="~/m", output="o", data=config.data).model == "/home/me/m"


def test_paths_that_are_longer_than_the_system_allows(file: Path) -> None:
    for path in ("a" * 256, "ü" * 128, "new/" + "a" * 300, "a/" * 2048):
        assert "is longer than a path may be" in message(file, f"output={path}")
    assert load_config(file, ["output=" + "a" * 255, "model=" + "a/" * 2047])


def test_paths_that_the_locale_cannot_express(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found before training, not where the result is written."""

    def fsencode(path: str) -> bytes:
        return path.encode("ascii")

    monkeypatch.setattr("os.fsencode", fsencode)
    assert "expected a UTF-8 locale, or PYTHONUTF8=1" in message(file, "output=ü")


def test_dates_are_texts_and_json_is_yaml(file: Path) -> None:
    assert load_config(file, ["output=2024-99-99"]).output == "2024-99-99"
    assert load_config(file, [r'output="\ud83d\ude00"']).output == "\U0001f600"
    assert load_config(file, ["output=="]).output == "="
    file.write_text(MINIMAL + "train: &t {steps: 9}\nscore: {}\nmesh: {<<: {expert: 2}}\n")
    assert load_config(file).mesh.expert == 2


def test_saved_file_loads_back_equal_and_holds_every_key(file: Path, tmp_path: Path) -> None:
    expert_cfg = tmp_path / "expert_cfg.json"
    expert_cfg.touch()
    config = load_config(file, [f"expert_cfg={expert_cfg}", "select.top_p=0.30000000000000004"])
    saved = tmp_path / "resolved.yaml"
    save_config(config, saved)
    assert load_config(saved) == config
    lines = [line.strip().partition(":")[0] for line in saved.read_text().splitlines()]
    for field in dataclasses.fields(RunConfig):
        assert field.name in lines
    assert {"warmup_steps", "too_long", "also", "rates", "max_new_tokens"} <= set(lines)


def test_how_chats_are_rendered(file: Path, tmp_path: Path) -> None:
    def chat_format(config: RunConfig) -> ChatFormat:
        data = config.data
        return ChatFormat.read(data.chat_template, data.template_arguments, data.stop_token)

    assert chat_format(load_config(file)) == ChatFormat()
    template = tmp_path / "own.jinja"
    given = [
        f"data.chat_template={template}",
        "data.template_arguments={enable_thinking: false, levels: [1, a: null]}",
        "data.stop_token=<|end|>",
    ]
    config = load_config(file, given)
    with pytest.raises(InputError, match=r"own\.jinja: cannot be read: No such file"):
        chat_format(config)
    template.write_text("")
    with pytest.raises(InputError, match=r"own\.jinja: is empty; expected a chat template"):
        chat_format(config)
    template.write_text("mine")
    arguments = {"enable_thinking": False, "levels": [1, {"a": None}]}
    assert chat_format(config) == ChatFormat("mine", arguments, "<|end|>")
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_threshold_of_the_paper_unless_given() -> None:
    assert SelectConfig(method="token").threshold == 0.2
    assert SelectConfig(method="gate").threshold == 0.1
    assert SelectConfig(method="gate", top_p=0.5).threshold == 0.5
    assert SelectConfig(top_k=3).threshold is SelectConfig(max_bytes=10**9).threshold is None


def test_flags_of_older_versions_are_read(file: Path) -> None:
    old = ["select.shared_experts=true", "select.non_expert_modules=false"]
    assert load_config(file, [*old, "select.also=[router]"]).select.also == (
        "shared_experts",
        "router",
    )
    assert load_config(file, old) == load_config(file, ["select.also=[shared_experts]"])
    assert load_config(file, [old[1]]) == load_config(file)
    assert SelectConfig("gate", non_expert_modules=True) == SelectConfig(
        "gate", also=("router", "non_expert_modules")
    )
    for overrides, problem in (
        (["select.shared_experts=1"], "select: key 'shared_experts' must be true or false, not 1"),
        ([old[1], "select.also=[non_expert_modules]"], "is false, but also names it"),
    ):
        assert problem in message(file, *overrides)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("select.also=[rooter]", "select.also.0: unknown part 'rooter'; did you mean router?"),
        ("select.also=router", "select.also: expected a list, got 'router'"),
        ("select.also=[experts]", "select.also.0: unknown part 'experts'; did you mean shared_"),
        ("optimizer.rates={mtp: 1}", "optimizer.rates.mtp: unknown part 'mtp'; did you mean"),
        ("optimizer.rates={router: 0}", "optimizer.rates.router: expected greater than 0, got 0"),
        ("optimizer.rates=1e-3", "optimizer.rates: expected a valid dictionary, got 0.001"),
        ("train.stepz=1", "unknown key train.stepz; did you mean train.steps?"),
        ("learning_rate=1", "unknown key learning_rate; did you mean optimizer.learning_rate?"),
        ("modell=m", "unknown key modell; did you mean model?"),
        ("tran.steps=1", "unknown key tran; did you mean train?"),
        ("train={stepz: 1}", "unknown key train.stepz; did you mean train.steps?"),
        ("train.steps='4'", "train.steps: expected a valid integer, got '4'"),
        ("train.steps=4.0", "train.steps: expected a valid integer, got 4.0"),
        ("train.steps=true", "train.steps: expected a valid integer, got True"),
        ("train.steps=0", "train.steps: expected greater than or equal to 1, got 0"),
        ("train.verify_frozen=1", "train.verify_frozen: expected a valid boolean, got 1"),
        ("train=", "train: expected a mapping of keys to values, got None"),
        ("model.x=1", "model has no keys of its own"),
        ("data.train=task.jsonl", "data.train: expected a list, got 'task.jsonl'"),
        ("data.train=[]", "data.train: expected at least one item, got []"),
        ("data.train=[a, 3]", "data.train.1: expected a valid string, got 3"),
        ("data.template_arguments=[a]", "data.template_arguments: expected a valid dictionary"),
        ("data.template_arguments={messages: 1}", "data.template_arguments.messages: expected the"),
        ("data.template_arguments.a-b=1", "data.template_arguments.a-b: expected the name of a"),
        ("data.stop_token=''", "data.stop_token: expected at least 1 character"),
        ("data.chat_template=gs://b/c", "data.chat_template: 'gs://b/c' is a URL"),
        ("data.mix.x.train=a", "data.mix.x.train: expected a list, got 'a'"),
        ("data.mix={x: {train: [a], wait: 2}}", "unknown key data.mix.x.wait; did you mean "),
        ("data.mix.x.weight=0", "data.mix.x.train: this key is missing"),
        ("data.mix={task: {train: [a]}}", "data.mix.task: expected a name of at most 60"),
        ("data.mix={x: {train: [a], valid: [b]}}", "data.mix.x.valid: needs data.valid"),
        ("data.mix={a/b: {train: [a]}}", "data.mix.a/b: expected a name of at most 60"),
        ("data.mix={ab: {train: [a]}, aB: {train: [b]}}", "data.mix: ab and aB differ in case"),
        ("data.mix.-x.train=[a]", "data.mix.-x: expected a name of at most 60 letters"),
        (
            "evaluation.others={scores.json: {valid: [a]}}",
            "evaluation.others.scores.json: expected",
        ),
        ("evaluation.others={..: {valid: [a]}}", "evaluation.others...: expected a name of"),
        ("evaluation.others={a/b: {valid: [a]}}", "evaluation.others.a/b: expected a name of"),
        ("evaluation.others={Task: {valid: [a]}}", "evaluation.others.Task: expected a name of"),
        ("evaluation.others={ü: {valid: [a]}}", "evaluation.others.ü: expected a name of"),
        ("evaluation.others={a: {valid: [a]}, A: {valid: [a]}}", "evaluation.others: a and A"),
        ("seed=9223372036854775808", "'9223372036854775808' is no integer of 64 bits"),
        ("seed=4294967296", "seed: expected less than 4294967296, got 4294967296"),
        ("train.steps=2147483648", "train.steps: expected less than 2147483648"),
        ("mesh.data=2147483648", "mesh.data: expected less than 2147483648"),
        (
            "select.max_bytes=9223372036854775807000",
            "'9223372036854775807000' is no integer of 64 bits",
        ),
        ("optimizer.learning_rate=1e400", "optimizer.learning_rate: expected a finite number"),
        ("train.steps=!!int abc", "'abc' is no int; expected valid YAML 1.2"),
        ("output=gs://bucket/x", "output: 'gs://bucket/x' is a URL; gs: is not read or written"),
        ("model=hf://owner/name", "model: 'hf://owner/name' is a URL"),
        ("data.train=[s3://b/a.jsonl]", "data.train.0: 's3://b/a.jsonl' is a URL"),
        ("data.mix.x.valid=['file:///a']", "data.mix.x.train: this key is missing"),
        ("evaluation.data=https://x/y.jsonl", "evaluation.data: 'https://x/y.jsonl' is a URL"),
        ("select.scores=[gs:/b]", "select.scores.0: 'gs:/b' is a URL"),
        ("output=~nobody-of-this-name/run", "output: '~nobody-of-this-name/run': no user"),
        ('output="a\\0b"', "output: 'a\\x00b' has a zero byte; expected a path"),
        ("output=''", "output: expected at least 1 character"),
        ('output="\\ud800"', "'\\ud800' is no str; expected valid YAML 1.2"),
        ("data.mix=[a]", "data.mix: expected a valid dictionary, got ['a']"),
        ("model=", "model: expected a valid string, got None"),
        ("method=lor", "method: expected 'esft', 'full' or 'lora', got 'lor'"),
        ("lora.rank=0", "lora.rank: expected greater than or equal to 1, got 0"),
        ("lora.rank=4", "lora: method esft reads none of it; expected method: lora"),
        ("lora.target=[experts]", "unknown key lora.target; did you mean lora.targets?"),
        (
            "lora.targets=[atention]",
            "lora.targets.0: unknown target 'atention'; did you mean atten",
        ),
        ("lora.targets=[3]", "lora.targets.0: unknown target 3; did you mean"),
        ("lora.targets=[]", "lora.targets: expected at least one item, got []"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: expected a finite number"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: expected greater than 0, got 0"),
        ("optimizer.beta1=1.0", "optimizer.beta1: expected less than 1, got 1.0"),
        ("select.top_p=0.0", "select.top_p: expected greater than 0, got 0.0"),
        ("select.top_k=0", "select.top_k: expected greater than or equal to 1, got 0"),
        ("select={top_p: 0.1, top_k: 3}", "select.top_k: top_p is set too; expected one of them"),
        ("select={top_k: 3, group_size: 2}", "select.top_k: 3 is no multiple of group_size = 2"),
        ("select.allocation=uniform", "select.allocation: there is no budget to divide; expected"),
        ("select.allocation=even", "select.allocation: expected 'global', 'uniform' or 'top_p'"),
        ("score.methods=[contrast]", "score.general: contrast compares with it; expected files"),
        ("score.methods=[random, random]", "score.methods: one is named twice in random, random"),
        ("score.methods=[token]", "score.methods.0: expected 'contribution', 'contrast', 'gate_t"),
        ("score.general=[a]", "score.general: only contrast reads it; expected contrast in score"),
        ("score.general_format=text", "score.general_format: score.general names no files"),
        ("select.groups_from=x", "select.groups_from: group_size is 1; expected a larger one"),
        (
            "select={scores: [a, b], max_bytes: 3}",
            "select.max_bytes: the union of several tasks would exceed it; expected one task",
        ),
        (
            "select={scores: [a, b], group_size: 2}",
            "select.groups_from: each task would have its own groups; expected scores to group by",
        ),
        ("evaluation.top_p=1.5", "evaluation.top_p: expected less than or equal to 1, got 1.5"),
        ("optimizer.final_lr_fraction=2", "optimizer.final_lr_fraction: expected less than or"),
        ("optimizer.learning_rate=1e39", "optimizer.learning_rate: expected a number that 32 bits"),
        ("optimizer.clip_norm=3.5e38", "optimizer.clip_norm: expected a number that 32 bits hold"),
        ("optimizer.epsilon=1e-39", "optimizer.epsilon: expected a number that 32 bits hold, 1.18"),
        ("optimizer.weight_decay=1e-300", "optimizer.weight_decay: expected a number that 32"),
        ("evaluation.temperature=1e-46", "evaluation.temperature: expected a number that 32 bits"),
        ("evaluation.metric=f1", "evaluation.metric: expected one of intent, exact_match, chrf"),
        ("mesh.data=0", "mesh.data: no devices; expected -1"),
        ("init=random", "init: random weights have no experts to select; expected pretrained"),
        ("train.balance_loss=0.1", "train.balance_loss: the router is frozen with method esft"),
        ("train.micro_batches=5", "train.micro_batches: 5 equal parts do not make up a batch"),
        ("optimizer.warmup_steps=501", "optimizer.warmup_steps: 501 is more than train.steps"),
        ("train.steps={", "expected the node content, but found '<stream end>'; expected valid"),
        ("train.steps", "expected key=value, such as train.steps=100"),
        ("train..steps=1", "expected key=value, such as train.steps=100"),
    ],
)
def test_bad_override_is_named(file: Path, override: str, problem: str) -> None:
    assert message(file, override).startswith(f"override {override!r}: {problem}")


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["method=full", "train.verify_frozen=true"], "train.verify_frozen: method full freezes"),
        (["method=full", f"expert_cfg={__file__}"], "expert_cfg: method full trains every expert"),
        (["method=lora", f"expert_cfg={__file__}"], "expert_cfg: lora.targets has no selected_exp"),
        (["method=lora", "lora.targets=[experts, selected_experts]"], "expected one of them"),
        (["method=lora", "lora.targets=[experts, experts]"], "a target is named twice"),
        (["method=lora", "select.also=[router]"], "select.also: lora.targets says what is trained"),
        (["method=lora", "init=random"], "init: low-rank updates need weights to update"),
        (["method=lora", "train.balance_loss=0.1"], "the router is frozen with method lora"),
        ([f"expert_cfg={__file__}", "select.scores=[a]"], "select.scores: expert_cfg says already"),
        (
            [f"expert_cfg={__file__}", "select.also=[router]"],
            "select.also: expert_cfg says already",
        ),
        (["method=full", "select.also=[router]"], "select.also: method full trains every"),
        (
            ["expert_cfg=none.json"],
            "expert_cfg: none.json: cannot be read: No such file or directory; expected a",
        ),
    ],
)
def test_keys_that_exclude_each_other(file: Path, overrides: list[str], problem: str) -> None:
    assert problem in message(file, *overrides)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (MINIMAL + "trian: {}\n", "FILE:7: unknown key trian; did you mean train?"),
        (MINIMAL + "  beta3: 0.9\n", "FILE:7: unknown key optimizer.beta3; did you mean"),
        (MINIMAL + "init: random\n", "FILE:7: init: random weights"),
        (MINIMAL.replace("[task.jsonl]", "\n    - a\n    - 3"), "FILE:6: data.train.1: expected a"),
        (MINIMAL.replace("model:", "modle:"), "FILE:1: unknown key modle; did you mean model?"),
        (MINIMAL.replace("train:", "valid:"), "FILE:3: data.train: this key is missing"),
        (MINIMAL.replace("model: models/m", ""), "FILE: model: this key is missing"),
        (MINIMAL + "model: twice\n", 'FILE:7: found duplicate key "model"'),
        (MINIMAL + "seed: [1\n", "FILE:8: "),
        (MINIMAL + "seed: !!int x\n", "FILE:7: 'x' is no int; expected valid YAML 1.2"),
        (MINIMAL + "seed: !!int ''\n", "FILE:7: '' is no int; expected valid YAML 1.2"),
        (MINIMAL + "seed: " + "9" * 5000, "FILE:7: '9999"),
        (MINIMAL + "seed: 0x" + "f" * 5000, "FILE:7: '0xff"),
        (
            MINIMAL + "seed: 2024-99-99\n",
            "FILE:7: seed: expected a valid integer, got '2024-99-99'",
        ),
        (MINIMAL + "seed: !!python/name:os.system\n", "FILE:7: could not determine a constructor"),
        (MINIMAL + "seed: !!binary eA==\n", "FILE:7: could not determine a constructor"),
        (MINIMAL + "seed: &a [*a]\n", "FILE:7: an alias stands for what it is a part of"),
        (MINIMAL + "seed: \0\n", "FILE: unacceptable character #x0000"),
        (MINIMAL + 'seed: "\\U99999999"\n', r"FILE:7: \U99999999 is an escape of no Unicode"),
        (MINIMAL + 'seed: "\\UFFFFFFFF"\n', r"FILE:7: \UFFFFFFFF is an escape of no Unicode"),
        ("%YAML 1." + "9" * 5000 + "\n---\n" + MINIMAL, "FILE: Exceeds the limit (4300 digits)"),
        (MINIMAL + "seed: " + "[" * 5000, "FILE: nested too deeply; expected valid YAML 1.2"),
        (MINIMAL + "---\na: 1\n", "FILE:7: but found another document; expected valid YAML"),
        (BOMB, "FILE:1: aliases make more than 1,000,000 values of it; expected valid YAML 1.2"),
        ("- 1\n", "FILE: expected a mapping of keys to values at the top level"),
        ("", "FILE: expected a mapping of keys to values at the top level"),
    ],
)
def test_bad_file_is_named_with_its_line(file: Path, text: str, problem: str) -> None:
    file.write_text(text)
    assert message(file).startswith(problem)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    assert message(tmp_path / "none.yaml").startswith("FILE: ")
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    assert "not UTF-8" in message(tmp_path / "latin.yaml")


def test_building_by_hand_checks_too() -> None:
    data = DataConfig(train=("a",))
    assert RunConfig(model="m", output="o", data=data).data is data
    with pytest.raises(ValueError, match="init: random weights"):
        RunConfig(model="m", output="o", data=data, init="random")
    with pytest.raises(ValueError, match="top_p"):
        SelectConfig(top_p=2.0)


def test_an_optimizer_has_its_own_defaults(file: Path, tmp_path: Path) -> None:
    def kept(*overrides: str) -> tuple:
        config = load_config(file, overrides)
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config
        given = config.optimizer
        return given.beta1, given.beta2, given.epsilon, given.momentum

    assert kept() == kept("optimizer.beta1=null") == (0.9, 0.95, 1e-8, None)
    assert kept("optimizer.name=lion", "optimizer.beta1=0.8") == (0.8, 0.99, None, None)
    assert kept("optimizer.name=muon") == (0.9, 0.95, 1e-8, 0.95)
    assert kept("optimizer.name=sgd", "optimizer.momentum=0") == (None, None, None, 0)
    assert kept("optimizer.name=adafactor") == (None,) * 4


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (
            ["name=sgd", "beta2=0.9"],
            "beta2: sgd reads none (adamw, lion, muon would); expected null",
        ),
        (["name=lion", "epsilon=1e-8"], "epsilon: lion reads none"),
        (["name=adafactor", "beta1=0.9"], "beta1: adafactor reads none"),
        (["momentum=0.9"], "momentum: adamw reads none (muon, sgd would)"),
        (["name=sgd", "momentum=0", "moments=bfloat16"], "moments: sgd without momentum has none"),
        (["name=[adam]"], "name: expected 'adamw', 'adafactor', 'lion', 'muon' or 'sgd', got"),
        (["moments=float16"], "moments: expected 'float32' or 'bfloat16', got"),
        (["warmup_steps=5", "warmup_share=0.1"], "warmup_share: warmup_steps is set too; expected"),
        (["decay_share=0.1"], "decay_share: constant reads none (wsd would); expected null"),
        (
            ["schedule=wsd", "warmup_share=0.9"],
            "decay_share: 100 updates, after 450 of the warm-up, are more than train.steps = 500",
        ),
        (["schedule=inverse_sqrt"], "schedule: inverse_sqrt falls by the updates of the warm-up"),
    ],
)
def test_what_an_optimizer_does_not_read_is_refused(
    file: Path, overrides: list[str], problem: str
) -> None:
    assert f": optimizer.{problem}" in message(file, *(f"optimizer.{key}" for key in overrides))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_load(path: Path) -> None:
    load_config(path)


def test_every_key_is_documented_with_its_default() -> None:
    """The YAML in docs/configuration.md holds every key, and the defaults of the code."""
    text = (CONFIGS.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    documented = YAML(typ="safe", pure=True).load(text.split("```yaml")[1].split("```")[0])
    config = TypeAdapter(RunConfig).validate_json(json.dumps(documented))
    required = {"model": config.model, "output": config.output, "data": {"train": ["train.jsonl"]}}
    assert config == TypeAdapter(RunConfig).validate_json(json.dumps(required))

    def keys(tree: dict) -> set[str]:
        nested = {f"{k}.{n}" for k, v in tree.items() if isinstance(v, dict) for n in keys(v)}
        return set(tree) | nested

    assert keys(documented) == keys(dataclasses.asdict(config))
