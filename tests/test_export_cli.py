import jax.numpy as jnp
import numpy as np

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import save_adapter
from esft_jax.checkpoint.load import load_base
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.export import main
from tests.checkpoint.checkpoints import expert_names, save, torch_model


def test_exports(tmp_path, capsys):
    base, adapter, target = (tmp_path / name for name in ("base", "adapter", "export"))
    save(torch_model(), base)
    shapes = ((16, 32), (16, 32), (32, 16))
    tensors = {
        n: np.full(s, 2, jnp.bfloat16) for n, s in zip(expert_names(1, 4), shapes, strict=True)
    }
    manifest = {"base_fingerprint": load_base(base).fingerprint}
    save_adapter(adapter, tensors.items(), ExpertConfig({1: (4,)}), manifest)
    capsys.readouterr()
    arguments = ["--base", str(base), "--adapter", str(adapter), "--to", str(target)]
    assert main(arguments) == 0
    found, before = TensorFiles(target), TensorFiles(base)
    printed = capsys.readouterr().out
    assert f"written to {target}" in printed
    assert f"all {len(found)} tensors in float32, 3 cast from bfloat16" in printed
    assert set(found) == set(before)
    for name in found:
        np.testing.assert_array_equal(found.read(name), tensors.get(name, before.read(name)))

    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error == f"error: {target}: exists; expected a new or empty folder\n"


def test_another_base_is_one_line_and_code_2(tmp_path, capsys):
    base, adapter = save(torch_model(), tmp_path / "base"), tmp_path / "adapter"
    experts = ExpertConfig({}, also=("shared_experts",))
    names = [
        f"model.layers.{i}.mlp.shared_experts.{k}_proj.weight"
        for i in (1, 2)
        for k in ("gate", "up", "down")
    ]
    tensors = TensorFiles(base)
    save_adapter(
        adapter, [(n, tensors.read(n)) for n in names], experts, {"base_fingerprint": "0" * 64}
    )
    capsys.readouterr()
    arguments = ["--base", str(base), "--adapter", str(adapter), "--to", str(tmp_path / "new")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "manifest.json: base_fingerprint: trained on another base" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()
