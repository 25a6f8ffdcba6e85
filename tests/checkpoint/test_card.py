"""Model cards: metadata that the hub reads, and what people read."""

import json

import pytest
from huggingface_hub import ModelCard

from esft_jax import export
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import load_adapter
from esft_jax.checkpoint.card import adapter_card, declared_license, model_card
from esft_jax.train import main

MANIFEST = {
    "base_model": "owner/base",
    "base_license": "apache-2.0",
    "base_fingerprint": "f" * 64,
    "data_sha256": {"law | order.jsonl": "a" * 64},
    "select": {"method": "token", "top_p": 0.2, "top_k": None, "also": []},
    "step": 40,
    "valid_loss": 0.51234,
}
FIGURES = [{"name": "task", "measure": "intent, %", "before": None, "after": 60.66}]


def test_an_adapter(tmp_path):
    experts = ExpertConfig({1: (5, 0), 3: ()}, ("router",))
    text = adapter_card(tmp_path / "law" / "adapter", MANIFEST, experts, FIGURES)
    card = ModelCard(text)
    assert (card.data.base_model, card.data.license) == ("owner/base", "apache-2.0")
    assert card.data.base_model_relation == "adapter" and "esft" in card.data.tags
    assert "\n# law\n" in card.text and "2 routed experts in 1 layers, router" in card.text
    lines = card.text.splitlines()
    assert "| data, with SHA-256 | law \\| order.jsonl: " + "a" * 64 + " |" in lines
    assert "| selection | method: token, top_p: 0.2 |" in lines
    assert "| task | intent, % |  | 60.66 |" in lines and "| 1 | 5 0 |" in lines
    assert "--model owner/base --adapter ADAPTER" in text


def test_a_base_that_is_not_on_the_hub(tmp_path):
    manifest = {"base_model": str(tmp_path), "updates": ["a", "b"]}
    card = ModelCard(adapter_card(tmp_path / "low", manifest, None))
    assert card.data.base_model is None and card.data.license is None
    assert (
        "A low-rank adapter (2 matrices)" in card.text and "not declared by the base" in card.text
    )
    whole = ModelCard(model_card(tmp_path / "whole", manifest, "A model."))
    assert whole.data.to_dict()["library_name"] == "transformers" and "A model." in whole.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: mit\n---\n# x", "mit"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: [mit\n---\n", None),
        ("# x\n", None),
        (None, None),
    ],
)
def test_the_licence_of_a_base(tmp_path, text, expected):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert declared_license(tmp_path) == expected


@pytest.mark.parametrize("method", ["esft", pytest.param("full", marks=pytest.mark.slow)])
def test_figures_of_an_evaluation(base, chats, tmp_path, method):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "What is 1 plus 1?", "raw_answers": ["2"]}) + "\n")
    config = tmp_path / "run.json"
    content = {
        "model": str(base),
        "output": str(tmp_path / "run"),
        "method": method,
        "dtype": "float32",
        "data": {"train": [str(chats)], "sequence_length": 32},
        "score": {"samples": 8, "sequence_length": 32, "batch_size": 8},
        "train": {"steps": 1, "batch_size": 8, "eval_every": 1, "save_every": 1},
        "evaluation": {"data": str(prompts), "max_new_tokens": 2},
    }
    config.write_text(json.dumps(content))
    assert main(["--config", str(config)]) == 0
    folder = tmp_path / "run" / ("adapter" if method == "esft" else "model")
    text = ModelCard.load(folder / "README.md").text
    assert "| task | exact_match, % |" in text and "\n# run\n" in text
    if method == "esft":
        assert load_adapter(folder).manifest["base_fingerprint"] in text
        to = tmp_path / "export"
        assert export.main(["--base", str(base), "--adapter", str(folder), "--to", str(to)]) == 0
        exported = ModelCard.load(to / "README.md").text
        assert f"`{base}` with the adapter" in exported
        rows = [line for line in text.splitlines() if line.startswith("| task |")]
        assert rows and set(rows) <= set(exported.splitlines())
