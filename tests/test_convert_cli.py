import json

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
