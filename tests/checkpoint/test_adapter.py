import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.checkpoint import adapter as adapter_module
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter, save_adapter, trained_tensors
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.errors import InputError
from esft_jax.families import tensor_table
from esft_jax.sharding import make_mesh
from tests.checkpoint.checkpoints import assert_same, expert_names, leaves

EXPERTS = ExpertConfig({1: (5, 0), 2: (3,)})
NAMES = [*expert_names(1, 0), *expert_names(1, 5), *expert_names(2, 3)]


def train(model, experts):
    """A stand-in for training: other values in every trained parameter."""
    attach_tuned_experts(model, experts)
    graph, tuned, frozen = partition(model, experts)
    tuned = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 1.5 + 0.01, state))(tuned)
    return nnx.merge(graph, tuned, frozen), tuned


def save_trained(folder, base, experts=EXPERTS):
    model, tuned = train(base.model, experts)
    manifest = {"base_fingerprint": base.fingerprint, "step": 7}
    save_adapter(folder, trained_tensors(model, tuned), experts, manifest)
    return model


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    save_trained(folder, load_base(tiny[1], jnp.float32))
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_holds_only_the_trained_tensors_under_their_names(tiny, saved):
    model, _ = train(load_model(tiny[1]), EXPERTS)
    tensors = load_file(saved / "model.safetensors")
    assert sorted(tensors) == sorted(NAMES)
    placements = tensor_table(model.config).places
    rows = {(layer, expert): row for layer, expert, row in model.tuned_experts.layout.rows()}
    gate_up = model.tuned_experts.gate_up[...][rows[1, 3]]
    gate, up, down = expert_names(2, 3)
    np.testing.assert_array_equal(tensors[gate], gate_up[:, :16].T)
    np.testing.assert_array_equal(tensors[up], gate_up[:, 16:].T)
    np.testing.assert_array_equal(tensors[down], model.tuned_experts.down[...][rows[1, 3]].T)
    assert all(tensor.shape == placements[name].shape for name, tensor in tensors.items())
    assert json.loads((saved / "manifest.json").read_text())["step"] == 7
    assert ExpertConfig.load(saved / "expert_cfg.json") == EXPERTS


@pytest.mark.parametrize("mesh", [None, (2, 4)])
def test_round_trip_is_exact_on_any_mesh(tiny, saved, tmp_path, mesh):
    mesh = mesh and make_mesh(*mesh)
    base = load_base(tiny[1], jnp.float32, mesh)
    before = {path: np.asarray(leaf) for path, leaf in leaves(base.model).items()}
    shardings = {path: leaf.sharding for path, leaf in leaves(base.model).items()}
    save_trained(tmp_path / "again", base)
    again = load_file(tmp_path / "again" / "model.safetensors")
    for name, tensor in load_file(saved / "model.safetensors").items():
        np.testing.assert_array_equal(again[name], tensor, name)

    merged = load_model(tiny[1], mesh=mesh)
    apply_adapter(merged, load_adapter(tmp_path / "again"), base.fingerprint)
    after = leaves(merged)
    assert {path: leaf.sharding for path, leaf in after.items()} == shardings
    changed = [path for path in after if not np.array_equal(after[path], before[path])]
    assert changed == [("moe_blocks", "moe", "experts", n) for n in ("down", "gate_up")]
    gate_up = np.array(after[changed[1]])
    for layer, expert in ((0, 0), (0, 5), (1, 3)):
        gate_up[layer, expert] = before[changed[1]][layer, expert]
    np.testing.assert_array_equal(gate_up, before[changed[1]])
    # Saving what was merged gives the same adapter again.
    for name, tensor in adapter_module.model_tensors(merged, NAMES, jnp.float32):
        np.testing.assert_array_equal(tensor, again[name], name)


@pytest.mark.parametrize(
    ("experts", "count"),
    [
        (ExpertConfig({}, also=("shared_experts",)), 2 * 3),
        # All tensors but those of the 14 experts that are not selected.
        (ExpertConfig({2: (0, 1)}, also=("shared_experts", "non_expert_modules")), 83 - 14 * 3),
    ],
    ids=["shared", "all-modules"],
)
def test_other_trained_modules_are_stored_and_merged(tiny, tmp_path, experts, count):
    base = load_base(tiny[1], jnp.float32)
    trained = save_trained(tmp_path / "adapter", base, experts)
    adapter = load_adapter(tmp_path / "adapter")
    assert len(adapter.tensors) == count
    merged = load_model(tiny[1])
    apply_adapter(merged, adapter, base.fingerprint)
    expected = leaves(trained)
    for path, leaf in leaves(merged).items():
        if "experts" not in path:
            np.testing.assert_array_equal(leaf, expected[path], str(path))


def test_tensors_have_the_type_of_the_computation(tiny, tmp_path):
    base = load_base(tiny[1], jnp.bfloat16)
    save_trained(tmp_path / "adapter", base)
    adapter = load_adapter(tmp_path / "adapter")
    assert {adapter.tensors[name].dtype for name in adapter.tensors} == {np.dtype(jnp.bfloat16)}
    merged = load_model(tiny[1], jnp.bfloat16)
    apply_adapter(merged, adapter, base.fingerprint)
    assert {leaf.dtype for leaf in leaves(merged).values()} == {np.dtype(jnp.bfloat16)}


def test_large_adapters_are_sharded(tiny, tmp_path, monkeypatch, saved):
    monkeypatch.setattr(adapter_module, "_MAX_SHARD_BYTES", 6000)
    save_trained(tmp_path / "adapter", load_base(tiny[1], jnp.float32))
    files = sorted(path.name for path in (tmp_path / "adapter").glob("*.safetensors*"))
    assert files[0] == "model-00001-of-00005.safetensors"
    assert files[-1] == "model.safetensors.index.json"
    one, many = load_adapter(saved).tensors, load_adapter(tmp_path / "adapter").tensors
    assert sorted(many) == sorted(one)
    for name in one:
        np.testing.assert_array_equal(many[name], one[name])


def test_released_form_without_prefix_and_manifest(tiny, copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "manifest.json").unlink()
    save_file({n.removeprefix("model."): t for n, t in tensors.items()}, copy / "model.safetensors")
    adapter = load_adapter(copy)
    assert adapter.manifest is None
    assert sorted(adapter.tensors) == sorted(NAMES)
    merged = load_model(tiny[1])
    apply_adapter(merged, adapter, "whatever")
    found = dict(adapter_module.model_tensors(merged, NAMES, jnp.float32))
    for name in NAMES:
        np.testing.assert_array_equal(found[name], tensors[name])


def test_another_base_is_refused_and_stays_as_it_is(tiny, saved):
    model = load_model(tiny[1])
    with pytest.raises(InputError, match=r"manifest.json: base_fingerprint: trained on another"):
        apply_adapter(model, load_adapter(saved), "0" * 64)
    assert_same(model, load_model(tiny[1]))


def edit_config(folder, **experts):
    path = folder / "expert_cfg.json"
    content = json.loads(path.read_text())
    content["experts"] |= experts
    path.write_text(json.dumps(content))


def edit_tensors(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file({name: np.ascontiguousarray(t) for name, t in change(tensors).items()}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit_config(f, **{"2": [3, 8]}), "expert_cfg.json: .*layer 2: expert 8 is out"),
        (lambda f: edit_config(f, **{"0": [1]}), "expert_cfg.json: .*layer 0 is no MoE layer"),
        (
            lambda f: edit_config(f, **{"2": [3, 4]}),
            "tensor 'model.layers.2.mlp.experts.4.gate_proj.weight' is missing",
        ),
        (
            lambda f: edit_config(f, **{"1": [5]}),
            "unexpected tensor 'model.layers.1.mlp.experts.0.down_proj.weight'; expert_cfg.json",
        ),
        (
            lambda f: edit_tensors(f, lambda t: t | {NAMES[0]: t[NAMES[0]].T}),
            rf"tensor '{NAMES[0]}' has shape \[32, 16\]; .*expects \[16, 32\]",
        ),
        (lambda f: (f / "expert_cfg.json").unlink(), "expert_cfg.json: cannot be read"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights: expected model.safetensors"),
        (lambda f: (f / "manifest.json").write_text("{}"), "'base_fingerprint' is missing"),
        (lambda f: shutil.rmtree(f), "no such folder; expected an adapter"),
    ],
)
def test_adapters_that_do_not_fit(tiny, copy, damage, message):
    damage(copy)
    base = load_base(tiny[1], jnp.float32)
    with pytest.raises(InputError, match=message):
        apply_adapter(base.model, load_adapter(copy), base.fingerprint)
    assert_same(base.model, load_model(tiny[1]))


def test_a_failed_save_leaves_the_older_adapter(tiny, copy, monkeypatch):
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def tensors():
        yield NAMES[0], np.zeros((16, 32), np.float32)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_adapter(copy, tensors(), EXPERTS, {"base_fingerprint": ""})
    monkeypatch.setattr(adapter_module, "write_tensors", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapter(copy, [], EXPERTS, {"base_fingerprint": ""})
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == ["copy"]


def test_a_later_save_replaces_the_adapter(tiny, copy):
    tensors = [(NAMES[0], np.zeros((16, 32), np.float32))]
    save_adapter(copy, tensors, EXPERTS, {"base_fingerprint": "new"})
    adapter = load_adapter(copy)
    assert list(adapter.tensors) == NAMES[:1]
    assert adapter.manifest == {"base_fingerprint": "new"}
