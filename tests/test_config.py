"""RunConfig and its YAML: what is read, what is written, and what is refused with which words."""

import dataclasses
import json
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from ruamel.yaml import YAML

from esft_jax.config import DataConfig, RunConfig, SelectConfig, load_config, save_config
from esft_jax.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL = """\
model: models/m
output: runs/r
data:
  train: [task.jsonl]
optimizer:
  learning_rate: 1e-4
"""


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
    assert {"warmup_steps", "too_long", "shared_experts", "max_new_tokens"} <= set(lines)


def test_threshold_of_the_paper_unless_given() -> None:
    assert SelectConfig(method="token").threshold == 0.2
    assert SelectConfig(method="gate").threshold == 0.1
    assert SelectConfig(method="gate", top_p=0.5).threshold == 0.5
    assert SelectConfig(top_k=3).threshold is SelectConfig(max_bytes=10**9).threshold is None


@pytest.mark.parametrize(
    ("override", "problem"),
    [
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
        ("data.mix.x.train=a", "data.mix.x.train: expected a list, got 'a'"),
        ("data.mix={x: {train: [a], wait: 2}}", "unknown key data.mix.x.wait; did you mean "),
        ("data.mix.x.weight=0", "data.mix.x.train: this key is missing"),
        ("data.mix={task: {train: [a]}}", "data.mix.task: this is the name of data.train"),
        ("data.mix={x: {train: [a], valid: [b]}}", "data.mix.x.valid: needs data.valid"),
        ("data.mix={a/b: {train: [a]}}", "data.mix.a/b: expected a name of letters"),
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
        (["method=lora", "select.shared_experts=true"], "select.shared_experts: lora.targets says"),
        (["method=lora", "init=random"], "init: low-rank updates need weights to update"),
        (["method=lora", "train.balance_loss=0.1"], "the router is frozen with method lora"),
        ([f"expert_cfg={__file__}", "select.scores=[a]"], "select.scores: expert_cfg says already"),
        (["expert_cfg=none.json"], "expert_cfg: no file 'none.json'; expected one written by"),
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
