import json

import pytest

from esft_jax.checkpoint.load import load_model
from esft_jax.convert import main
from tests.checkpoint.checkpoints import assert_same, save, torch_model


def test_converts(tmp_path, capsys):
    folder, target = save(torch_model(), tmp_path / "hf"), tmp_path / "converted"
    (folder / "tokenizer.json").write_text("{}")
    capsys.readouterr()
    assert main(["--from", str(folder), "--to", str(target)]) == 0
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["source"] == str(folder)
    assert f"written to {target}, fingerprint {manifest['fingerprint']}" in capsys.readouterr().out
    assert (target / "tokenizer.json").read_text() == "{}"
    assert_same(load_model(folder), load_model(target))


def test_keeps_matrices_quantised(tmp_path, capsys):
    folder, target = save(torch_model(), tmp_path / "hf"), tmp_path / "converted"
    first = ["--quantise", "experts=int8,group_size=16"]
    assert main(["--from", str(folder), "--to", str(target), *first]) == 0
    assert main(["--to", str(target), *first, "--quantise", "rest=int8,experts=int4"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Quantised {target}"
    found = sorted(path.name for path in (target / "quantised").iterdir())
    assert found == ["experts-int4-64", "experts-int8-16", "rest-int8-64"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("experts", "experts: expected 'none', 'int8'"),
        ("experts=int4,experts=int8", "each of experts, rest, group_size once at most"),
        ("expert=int4", "'expert=int4'; expected KEY=VALUE,..., each of experts, rest, group_s"),
        ("experts=int5", "experts: expected 'none', 'int8'"),
        ("group_size=64", "'group_size=64'; expected experts or rest"),
        ("experts=int4,group_size=8", "group_size: expected greater than or equal to 16, got '8'"),
        ("experts=int4", "no converted checkpoint; expected one, or a source"),
        (None, "--from: missing; expected a Hugging Face folder"),
    ],
)
def test_bad_settings(tmp_path, capsys, text, message):
    option = [] if text is None else ["--quantise", text]
    assert main(["--to", str(tmp_path / "new"), *option]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_bad_input_is_one_line_and_code_2(tmp_path, capsys):
    folder = save(torch_model(), tmp_path / "hf")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    capsys.readouterr()
    assert main(["--from", str(folder), "--to", str(tmp_path / "new")]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {weights}: damaged or truncated safetensors")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert not (tmp_path / "new").exists()
