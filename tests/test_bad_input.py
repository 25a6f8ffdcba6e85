"""Every bad input a run can meet: one line that names it, exit code 2, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from esft_jax import train

Break = Callable[["Inputs"], None]


class Inputs:
    """A correct run configuration and its files; a test breaks one of them."""

    def __init__(self, folder: Path, base: Path, chats: Path):
        self.folder, self.output = folder, folder / "run"
        self.model, self.data, self.config = folder / "model", folder / "c.jsonl", folder / "r.yaml"
        shutil.copytree(base, self.model)
        shutil.copy(chats, self.data)
        self.overrides: list[str] = []
        self.config.write_text(
            f"model: {self.model}\noutput: {self.output}\ndtype: float32\n"
            f"data:\n  train: [{self.data}]\n  sequence_length: 64\n"
            "score:\n  sequence_length: 64\n  batch_size: 8\n"
            "train:\n  steps: 1\n  batch_size: 8\n"
        )

    def add_line(self, text: str) -> None:
        with self.data.open("a") as file:
            file.write(text + "\n")

    def add_chat(self, *messages: dict) -> None:
        self.add_line(json.dumps({"messages": messages}))

    def run(self) -> int:
        return train.main(["--config", str(self.config), *self.overrides])


def user(text: str = "hello") -> dict:
    return {"role": "user", "content": text}


def assistant(text: str = "hi") -> dict:
    return {"role": "assistant", "content": text}


def unknown_key(inputs: Inputs) -> None:
    inputs.config.write_text(inputs.config.read_text().replace("steps:", "step:"))


def wrong_type(inputs: Inputs) -> None:
    inputs.config.write_text(inputs.config.read_text().replace("steps: 1", "steps: many"))


def empty_data(inputs: Inputs) -> None:
    inputs.data.write_text("")


def expert_out_of_range(inputs: Inputs) -> None:
    path = inputs.folder / "experts.json"
    path.write_text(json.dumps({"experts": {"1": [8]}}))
    inputs.overrides.append(f"expert_cfg={path}")


def expert_of_dense_layer(inputs: Inputs) -> None:
    path = inputs.folder / "experts.json"
    path.write_text(json.dumps({"experts": {"0": [1]}}))
    inputs.overrides.append(f"expert_cfg={path}")


def missing_shard(inputs: Inputs) -> None:
    weights = inputs.model / "model.safetensors"
    names = list(load_file(weights))
    weight_map = {
        name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(names)
    }
    index = inputs.model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    weights.rename(inputs.model / "model-00001-of-00002.safetensors")


def missing_tensor(inputs: Inputs) -> None:
    weights = inputs.model / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.2.mlp.experts.5.up_proj.weight"]
    save_file(tensors, weights)


def truncated_weights(inputs: Inputs) -> None:
    weights = inputs.model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def set_template(inputs: Inputs, template: str) -> None:
    (inputs.model / "chat_template.jinja").write_text(template)


CASES: dict[str, tuple[Break, tuple[str, ...]]] = {
    "unknown configuration key": (unknown_key, ("r.yaml:", "step", "steps")),
    "wrong type": (wrong_type, ("r.yaml:", "train.steps", "many")),
    "no such model": (lambda i: i.overrides.append("model=./nowhere"), ("./nowhere",)),
    "no such data": (lambda i: i.data.unlink(), ("c.jsonl",)),
    "empty data file": (empty_data, ("c.jsonl",)),
    "broken JSON line": (lambda i: i.add_line('{"messages": ['), ("c.jsonl:41",)),
    "message without role": (
        lambda i: i.add_chat({"content": "x"}, assistant()),
        ("c.jsonl:41", "role"),
    ),
    "unknown role": (
        lambda i: i.add_chat(user(), {"role": "robot", "content": "x"}),
        ("c.jsonl:41", "robot", "assistant"),
    ),
    "tool calls": (
        lambda i: i.add_chat(user(), assistant("") | {"tool_calls": [{}]}),
        ("c.jsonl:41", "messages[1].tool_calls", "[{}]"),
    ),
    "weighted record": (
        lambda i: i.add_line(json.dumps({"messages": [user(), assistant()], "weight": 2})),
        ("c.jsonl:41", "weight", "2"),
    ),
    "prompts as training data": (
        lambda i: i.add_line('{"prompt": "a", "raw_answers": ["b"]}'),
        ("c.jsonl:41", "messages", "evaluation.data"),
    ),
    "nothing to learn": (lambda i: i.add_chat(user()), ("c.jsonl:41", "assistant")),
    "example longer than the sequence": (
        lambda i: i.add_chat(user("long " * 100), assistant()),
        ("c.jsonl:41", "65", "data.sequence_length"),
    ),
    "turn without a stop token": (
        lambda i: set_template(i, "{% for m in messages %}{{ m.content }}<end>{% endfor %}"),
        ("c.jsonl:1: messages[1]", "'It is 0.<end>'", "generation_config.json"),
    ),
    "template that takes too much": (
        lambda i: set_template(i, "{{ 'x' * 10**10 }}"),
        ("c.jsonl:1", "chat_template.jinja", "1024 MiB"),
    ),
    "sequence longer than the model's limit": (
        lambda i: i.overrides.append("data.sequence_length=256"),
        ("data.sequence_length", "256", "128"),
    ),
    "expert id out of range": (expert_out_of_range, ("experts.json", "8")),
    "expert of a dense layer": (expert_of_dense_layer, ("experts.json", "0")),
    "missing shard": (missing_shard, ("model-00002-of-00002.safetensors",)),
    "missing tensor": (missing_tensor, ("model.layers.2.mlp.experts.5.up_proj.weight",)),
    "truncated safetensors": (truncated_weights, ("model.safetensors",)),
    "mesh larger than the devices": (
        lambda i: i.overrides.extend(["mesh.data=4", "mesh.expert=4"]),
        ("mesh", "16", "8"),
    ),
    "mesh that does not divide the experts": (
        lambda i: i.overrides.extend(["mesh.data=1", "mesh.expert=3"]),
        ("mesh.expert", "3", "8"),
    ),
    "batch that does not divide over the devices": (
        lambda i: i.overrides.append("train.batch_size=6"),
        ("train.batch_size", "6", "8"),
    ),
    "folder of something else": (
        lambda i: (i.output.mkdir(), (i.output / "thesis.tex").touch()),
        ("output", "run"),
    ),
}


@pytest.fixture
def inputs(tmp_path: Path, base: Path, chats: Path) -> Inputs:
    return Inputs(tmp_path, base, chats)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, inputs: Inputs, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, named = CASES[case]
    damage(inputs)
    assert inputs.run() == 2
    captured = capsys.readouterr()
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("error: ")
    for text in named:
        assert text in line
    left = list(inputs.output.iterdir()) if inputs.output.exists() else []
    assert [path.name for path in left] in ([], ["thesis.tex"])
