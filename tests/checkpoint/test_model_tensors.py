"""What is saved of a model in memory: every tensor under its own name, wherever it lies."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from esft_jax.adapt.attach import attach, attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter, trained_tensors
from esft_jax.checkpoint.export import export_model, save_model
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.checkpoint.peft import save_lora
from esft_jax.errors import InputError
from esft_jax.sharding import make_mesh
from tests.checkpoint.checkpoints import expert_names, logits, with_factors

MESHES = [None, (2, 4)]
EXPERTS = ExpertConfig({1: (5, 0), 2: (3, 4, 7)})
LOADS = np.random.default_rng(0).dirichlet(np.ones(8), 2)


def on(mesh):
    return mesh and make_mesh(*mesh)


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], name)


@pytest.mark.parametrize(("mesh", "loads"), [(None, LOADS), ((2, 4), None), ((2, 4), LOADS)])
def test_a_model_with_tuned_experts_is_saved_as_it_was(tiny, tmp_path, tokens, mesh, loads):
    model = load_model(tiny[1], mesh=on(mesh))
    expected = load_model(tiny[1])
    attach_tuned_experts(model, EXPERTS, loads)
    save_model(model, tmp_path / "saved", tiny[1])
    assert_equal(
        load_file(tmp_path / "saved" / "model.safetensors"),
        weights(tiny[1]),
    )
    if mesh is None:
        np.testing.assert_allclose(logits(model, tokens), logits(expected, tokens), atol=1e-5)
    # Then what is trained of one expert, and nothing else, is another.
    row = {row[:2]: row[2] for row in model.tuned_experts.layout.rows()}[1, 4]
    bank = model.tuned_experts.down
    bank.set_value(bank.get_value().at[row].multiply(2))
    save_model(model, tmp_path / "saved", tiny[1])
    name = expert_names(2, 4)[2]
    before = weights(tiny[1])
    assert_equal(
        load_file(tmp_path / "saved" / "model.safetensors"), before | {name: 2 * before[name]}
    )
    found = dict(trained_tensors(model, nnx.State({})))
    assert len(found) == 5 * 3
    np.testing.assert_array_equal(found[name], 2 * before[name])
    np.testing.assert_array_equal(found[expert_names(1, 5)[0]], before[expert_names(1, 5)[0]])


@pytest.mark.parametrize(
    "targets",
    [
        ("attention", "dense_mlps", "shared_experts", "experts"),
        ("attention", "selected_experts"),
        ("attention",),
    ],
)
@pytest.mark.parametrize("mesh", MESHES)
def test_a_model_with_factors_is_saved_as_exported(tiny, tmp_path, mesh, targets):
    base = load_base(tiny[1], jnp.float32, on(mesh))
    parts, lora = with_factors(base, targets)
    model = nnx.merge(*parts)
    manifest = {"base_fingerprint": base.fingerprint, "base_model": "base"}
    save_lora(tmp_path / "adapter", model, lora, manifest)
    export_model(tiny[1], tmp_path / "adapter", tmp_path / "export")
    save_model(model, tmp_path / "saved", tiny[1])
    one, other = weights(tmp_path / "saved"), weights(tmp_path / "export")
    assert one.keys() == other.keys()
    before = weights(tiny[1])
    changed = set(load_adapter(tmp_path / "adapter").names)
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-5, err_msg=name)
        assert np.array_equal(one[name], before[name]) == (name not in changed)
    assert {name for name, _ in trained_tensors(model, nnx.State({}))} == changed


@pytest.mark.parametrize("mesh", MESHES)
def test_factors_of_moved_experts(tiny, tmp_path, mesh):
    model = load_model(tiny[1], mesh=on(mesh))
    lora = LoRA.on(model.config, 2, 2.0, ("selected_experts",), EXPERTS)
    attach(model, lora, 0, LOADS)
    save_model(model, tmp_path / "saved", tiny[1])  # updates of 0
    assert_equal(
        load_file(tmp_path / "saved" / "model.safetensors"),
        weights(tiny[1]),
    )


def test_what_is_not_there_is_not_saved(tiny, tmp_path):
    model = load_model(tiny[1])
    lora = LoRA.on(model.config, 2, 2.0, ("attention",), EXPERTS)
    manifest = {"base_fingerprint": "", "base_model": ""}
    attach_tuned_experts(model, EXPERTS)
    with pytest.raises(InputError, match="no low-rank factors to save"):
        save_lora(tmp_path / "adapter", model, lora, manifest)
    with pytest.raises(InputError, match="tuned experts or factors already"):
        attach_tuned_experts(model, EXPERTS)
    model = load_model(tiny[1])
    attach(model, lora, 0)
    with pytest.raises(InputError, match="tuned experts or factors already"):
        attach(model, lora, 0)
    save_lora(tmp_path / "attention", model, lora, manifest)
    with pytest.raises(InputError, match="tuned experts or factors already"):
        apply_adapter(model, load_adapter(tmp_path / "attention"), None)
    other = LoRA.on(model.config, 2, 4.0, ("attention",), EXPERTS)
    with pytest.raises(InputError, match="factors of rank 2 and scale 1; expected rank 2 and"):
        save_lora(tmp_path / "adapter", model, other, manifest)
    assert not (tmp_path / "adapter").exists()
