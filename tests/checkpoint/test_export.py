import errno
import json
import os

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from esft_jax.checkpoint import export as export_module
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter, model_tensors, save_adapter
from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.export import export_model, exported_config, save_model
from esft_jax.checkpoint.load import load_base, load_model, open_source
from esft_jax.checkpoint.model_tensors import ModelTensors
from esft_jax.checkpoint.source import HuggingFaceSource
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.errors import InputError
from esft_jax.families import load_model_config, read_model_config, tensor_table
from esft_jax.files import visible
from tests.checkpoint.checkpoints import (
    YARN,
    assert_same,
    logits,
    rewrite,
    save,
    torch_logits,
    torch_model,
)
from tests.checkpoint.test_adapter import EXPERTS, NAMES, save_trained
from tests.yardstick import torch


@pytest.mark.parametrize("converted", [False, True])
def test_experts_are_fused_where_the_base_has_them_fused(tiny, tmp_path, converted):
    model, folder = tiny
    experts = {n: t for n, t in model.state_dict().items() if ".mlp.experts." in n}

    def fuse(tensors):
        return {n: t for n, t in tensors.items() if ".mlp.experts." not in n} | experts

    base = rewrite(folder, tmp_path / "fused", fuse)
    expected = TensorFiles(base)
    if converted:
        base = tmp_path / "converted"
        convert_checkpoint(tmp_path / "fused", base)
    export_model(base, None, tmp_path / "export")
    found = TensorFiles(tmp_path / "export")
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found.read(name), expected.read(name))
    save_model(load_model(base), tmp_path / "model", base, fused=open_source(base).fused)
    assert TensorFiles(tmp_path / "model").keys() == expected.keys()


@pytest.fixture(scope="module")
def training(tiny, tmp_path_factory):
    """A model with a trained bank, and the adapter it saved."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    return save_trained(folder, load_base(tiny[1], jnp.float32)), folder


@pytest.fixture(scope="module")
def adapter(training):
    return training[1]


@pytest.fixture(scope="module")
def merged(tiny, adapter):
    """The base with the adapter applied in memory."""
    base = load_base(tiny[1], jnp.float32)
    apply_adapter(base.model, load_adapter(adapter), base.fingerprint)
    return base.model


def from_pretrained(folder):
    return transformers.DeepseekV2ForCausalLM.from_pretrained(
        folder, attn_implementation="eager"
    ).eval()


def test_transformers_loads_an_export_with_the_same_logits(
    tiny, training, merged, tokens, tmp_path, monkeypatch
):
    convert_checkpoint(tiny[1], tmp_path / "converted")
    monkeypatch.setattr(export_module, "_MAX_SHARD_BYTES", 100_000)
    trained, adapter = training
    export_model(tmp_path / "converted", adapter, tmp_path / "export")
    assert len(list((tmp_path / "export").glob("*.safetensors"))) == 3
    model = from_pretrained(tmp_path / "export")
    assert model.dtype == torch.float32
    found = torch_logits(model, tokens)
    np.testing.assert_allclose(found, logits(trained, tokens), atol=1e-4)
    assert np.abs(found - torch_logits(tiny[0], tokens)).max() > 1e-2
    assert_same(load_model(tmp_path / "export"), merged)


def test_both_forms_of_the_base_export_the_same_files(tiny, adapter, tmp_path):
    convert_checkpoint(tiny[1], tmp_path / "converted")
    export_model(tmp_path / "converted", adapter, tmp_path / "one")
    export_model(tiny[1], adapter, tmp_path / "two")
    for file in visible(tmp_path / "one", "[!R]*"):  # README.md names them
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_without_an_adapter_the_base_comes_back(tiny, tmp_path):
    convert_checkpoint(tiny[1], tmp_path / "converted")
    export_model(tmp_path / "converted", None, tmp_path / "export")
    assert load_base(tmp_path / "export").fingerprint == load_base(tiny[1]).fingerprint


def test_all_weights_have_the_smallest_type_that_loses_nothing(tiny, adapter, tmp_path, capsys):
    half = save(torch_model().bfloat16(), tmp_path / "half")
    adapter_of_half = tmp_path / "adapter"
    base = load_base(half, jnp.float32)
    trained = save_trained(adapter_of_half, base)
    capsys.readouterr()
    export_model(half, adapter_of_half, tmp_path / "export")
    files = TensorFiles(tmp_path / "export")
    assert {info.dtype for info in files.values()} == {"F32"}
    assert capsys.readouterr().out == (
        f"all {len(files)} tensors in float32, {len(files) - len(NAMES)} cast from bfloat16\n"
    )
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"
    stored = dict(model_tensors(trained, list(files), jnp.float32))
    for name in files:  # nothing is lost
        np.testing.assert_array_equal(files.read(name), stored[name])
    assert from_pretrained(tmp_path / "export").dtype == torch.float32
    export_model(half, None, tmp_path / "plain")
    assert capsys.readouterr().out == f"all {len(files)} tensors in bfloat16\n"
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_base(tmp_path / "plain").fingerprint == load_base(half).fingerprint


def test_a_float16_base_takes_a_bfloat16_adapter(tmp_path):
    half = save(torch_model().half(), tmp_path / "half")
    save_trained(tmp_path / "adapter", load_base(half, jnp.bfloat16))
    said = []
    export_model(half, tmp_path / "adapter", tmp_path / "export", say=said.append)
    files = TensorFiles(tmp_path / "export")
    assert {info.dtype for info in files.values()} == {"F32"}  # the smallest that holds both
    number = len(files) - len(NAMES)
    assert said == [
        f"all {len(files)} tensors in float32, {len(NAMES)} cast from bfloat16, "
        f"{number} cast from float16"
    ]


def test_all_weights_are_cast_on_request(tiny, adapter, tmp_path):
    export_model(tiny[1], adapter, tmp_path / "kept")
    said = []
    export_model(tiny[1], adapter, tmp_path / "cast", "bfloat16", said.append)
    kept, cast = TensorFiles(tmp_path / "kept"), TensorFiles(tmp_path / "cast")
    for name in kept:
        assert cast[name].dtype == "BF16"
        np.testing.assert_array_equal(cast.read(name), kept.read(name).astype(jnp.bfloat16))
    assert json.loads((tmp_path / "cast/config.json").read_text())["dtype"] == "bfloat16"
    assert said == [f"all {len(kept)} tensors in bfloat16, {len(kept)} cast from float32"]


def test_the_tokenizer_comes_along_and_foreign_files_stay(tiny, tmp_path):
    base = rewrite(tiny[1], tmp_path / "base", lambda tensors: tensors)
    (base / "tokenizer.json").write_text("{}")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "training_args.bin").write_bytes(b"")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    export_model(base, None, tmp_path / "export")
    assert (
        tmp_path / "export/additional_chat_templates/rag.jinja"
    ).read_text() == "{{ documents }}"
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "README.md",
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


PUBLISHED = {
    "rope_theta": 10000,
    "rope_scaling": {k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")}
    | {"type": "yarn"},
}


@pytest.mark.parametrize(
    "spelling", [{"rope_parameters": YARN}, PUBLISHED], ids=["transformers-5", "published"]
)
def test_config_json_has_both_spellings_of_rope(tiny, tokens, tmp_path, spelling):
    model, folder = tiny
    raw = json.loads((folder / "config.json").read_text())
    del raw["rope_parameters"]
    base = rewrite(folder, tmp_path / "base", lambda tensors: tensors)
    (base / "config.json").write_text(json.dumps(raw | spelling | {"auto_map": {"A": "b.C"}}))
    export_model(base, None, tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["rope_theta"] == 10000
    assert config["rope_scaling"] == PUBLISHED["rope_scaling"] | {"rope_type": "yarn"}
    assert config["rope_parameters"] == YARN
    assert "auto_map" not in config
    for key in ("rope_parameters", "rope_scaling"):
        alone = {k: v for k, v in config.items() if k != key}
        assert read_model_config(alone) == load_model_config(folder)
    found = torch_logits(from_pretrained(tmp_path / "export"), tokens)
    np.testing.assert_array_equal(found, torch_logits(model, tokens))


def test_plain_rope_in_both_spellings():
    config = exported_config({"rope_theta": 5000.0}, np.dtype(np.float32))
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000.0}
    assert config["rope_theta"] == 5000.0
    assert config["rope_scaling"] is None


def test_saving_a_whole_model(tiny, tmp_path, training, merged):
    save_model(training[0], tmp_path / "model", tiny[1])  # tuned experts come from their bank
    assert_same(load_model(tmp_path / "model"), merged)
    export_model(tiny[1], training[1], tmp_path / "export")
    files = visible(tmp_path / "model")
    exported = {path.name for path in visible(tmp_path / "export")}
    assert exported == {file.name for file in files} | {"README.md"}
    for file in files:
        assert file.read_bytes() == (tmp_path / "export" / file.name).read_bytes(), file.name
    save_model(load_model(tiny[1]), tmp_path / "model", tiny[1], jnp.bfloat16)  # replaces it
    infos = TensorFiles(tmp_path / "model").values()
    assert {info.dtype for info in infos} == {"BF16"}
    assert_same(load_model(tmp_path / "model", jnp.bfloat16), load_model(tiny[1], jnp.bfloat16))


def test_where_the_first_process_cannot_write_all_read_on(tiny, tmp_path, merged, monkeypatch):
    """Every tensor is gathered from all processes: the others would wait for it forever."""
    read, tensor = [], ModelTensors.tensor

    def count(tensors, name):
        read.append(name)
        return tensor(tensors, name)

    def full(folder, specs, tensors, max_bytes):
        next(tensors)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ModelTensors, "tensor", count)
    monkeypatch.setattr(export_module, "write_tensors", full)
    with pytest.raises(InputError, match="model: cannot be written: No space left on device"):
        save_model(merged, tmp_path / "model", tiny[1])
    assert read == list(tensor_table(merged.config).places)


def test_a_template_of_another_model_is_refused(tmp_path, merged):
    other = save(torch_model(n_routed_experts=4), tmp_path / "other")
    with pytest.raises(InputError, match=r"config.json: describes another model"):
        save_model(merged, tmp_path / "model", other)
    assert not (tmp_path / "model").exists()


def test_bad_input_writes_nothing(tiny, adapter, tmp_path, monkeypatch):
    other = save(torch_model(seed=1), tmp_path / "other")
    with pytest.raises(InputError, match="base_fingerprint: trained on another base"):
        export_model(other, adapter, tmp_path / "export")
    # The rest is seen without reading the base.
    monkeypatch.setattr(HuggingFaceSource, "digest", lambda self, name: 1 / 0)
    small = save(torch_model(moe_intermediate_size=8), tmp_path / "small")
    with pytest.raises(InputError, match=r"has shape .*; config.json expects"):
        export_model(small, adapter, tmp_path / "export")
    tensors = [(NAMES[0], np.zeros((16, 32), np.float32))]
    save_adapter(tmp_path / "part", tensors, EXPERTS, {"base_fingerprint": ""})
    with pytest.raises(InputError, match="is missing; expert_cfg.json names it"):
        export_model(tiny[1], tmp_path / "part", tmp_path / "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "part", "small"]


def test_a_target_in_use_is_left_alone(tiny, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(HuggingFaceSource, "digest", lambda self, name: 1 / 0)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists; expected a new or empty folder"):
        export_model(tiny[1], adapter, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_export_that_dies_leaves_nothing(tiny, tmp_path, monkeypatch):
    source = export_module.open_source(tiny[1])
    monkeypatch.setattr(export_module, "open_source", lambda path: source)
    monkeypatch.setattr(type(source), "tensor", lambda self, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_model(tiny[1], None, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_shared_experts_of_no_width_are_carried_along(tmp_path):
    """Transformers writes tensors without elements for them."""
    folder = save(torch_model(n_shared_experts=0), tmp_path / "model")
    export_model(folder, None, tmp_path / "export")
    found, expected = TensorFiles(tmp_path / "export"), TensorFiles(folder)
    shapes = {name: info.shape for name, info in expected.items()}
    assert {name: info.shape for name, info in found.items()} == shapes
    assert any(0 in shape for shape in shapes.values())
    convert_checkpoint(folder, tmp_path / "converted")
    export_model(tmp_path / "converted", None, tmp_path / "again")
    one, other = (tmp_path / name / "model.safetensors" for name in ("export", "again"))
    assert one.read_bytes() == other.read_bytes()
