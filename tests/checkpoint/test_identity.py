"""What runs, scores and adapters are bound to: weights, configuration, tokenizer and template."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import load_adapter, save_adapter
from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.export import export_model, save_model
from esft_jax.checkpoint.identity import chat_record, tokenizer_fingerprint
from esft_jax.checkpoint.load import load_model, open_source
from esft_jax.checkpoint.manifest import run_chat_format
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.data.chat_template import DEFAULT_TEMPLATE, ChatFormat
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.evaluation.load import load_tuned
from tests.checkpoint.checkpoints import expert_names


def fingerprint(folder: Path) -> str:
    return tokenizer_fingerprint(folder, Tokenizer.load(folder))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def copy(base, tmp_path) -> Path:
    return shutil.copytree(base, tmp_path / "copy")


def test_the_tokenizer_counts_not_its_files(base, copy):
    expected = fingerprint(base)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    template = config.pop("chat_template", None) or DEFAULT_TEMPLATE
    cut = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    edit(copy / "tokenizer.json", truncation=cut)
    (copy / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 5}))
    (copy / "chat_template.jinja").write_text(template)
    assert fingerprint(copy) == expected
    (copy / "chat_template.jinja").write_text(template + "!")
    assert fingerprint(copy) != expected
    (copy / "chat_template.jinja").write_text(template)
    edit(copy / "tokenizer_config.json", add_bos_token=not Tokenizer.load(base).begins_with_bos)
    assert fingerprint(copy) != expected


@pytest.fixture
def adapter(base, tmp_path) -> Path:
    """An adapter that changes nothing, bound to all of its base."""
    files, source = TensorFiles(base), open_source(base)
    manifest = {
        "base_fingerprint": source.fingerprint,
        "config_fingerprint": source.config.fingerprint,
        "tokenizer_fingerprint": fingerprint(base),
    }
    tensors = [(name, files.read(name)) for name in expert_names(1, 0)]
    save_adapter(tmp_path / "adapter", tensors, ExpertConfig({1: (0,)}), manifest)
    return tmp_path / "adapter"


def other_rope(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    theta = raw["rope_parameters"] | {"rope_theta": 5e5}
    edit(folder / "config.json", rope_parameters=theta, rope_theta=5e5)


def other_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(DEFAULT_TEMPLATE.replace("User", "Human"))


def other_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 2
    save_file(tensors, folder / "model.safetensors")


CHANGES = [
    (other_weights, "base_fingerprint: trained on another base: its weights"),
    (other_rope, "config_fingerprint: trained on another base: its config.json"),
    (other_template, "tokenizer_fingerprint: trained on another base: its tokenizer or chat"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES)
def test_an_adapter_is_bound_to_its_base(adapter, copy, tmp_path, change, message):
    change(copy)
    for use in (
        lambda: export_model(copy, adapter, tmp_path / "export"),
        lambda: load_tuned(copy, adapter, np.dtype("float32"), None),
    ):
        with pytest.raises(InputError, match=message):
            use()
    assert not (tmp_path / "export").exists()
    # A manifest of an older version says less.
    edit_manifest = json.loads((adapter / "manifest.json").read_text())
    for key in ("config_fingerprint", "tokenizer_fingerprint"):
        del edit_manifest[key]
    (adapter / "manifest.json").write_text(json.dumps(edit_manifest))
    if change is not other_weights:
        export_model(copy, adapter, tmp_path / "export")


@pytest.fixture
def own_chats(adapter, base) -> ChatFormat:
    """What the run of the adapter rendered its chats with."""
    source = "{{ style }}{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = ChatFormat(source, {"style": "x"}, "!")
    own = tokenizer_fingerprint(base, Tokenizer.load(base, chats))
    edit(adapter / "manifest.json", tokenizer_fingerprint=own, **chat_record(chats))
    return chats


def test_an_adapter_knows_how_its_run_rendered_chats(adapter, own_chats, base, tmp_path):
    assert run_chat_format(adapter) == own_chats
    assert run_chat_format(None) == ChatFormat()
    load_tuned(base, adapter, np.dtype("float32"), None)
    said = []
    export_model(base, adapter, tmp_path / "export", say=said.append)
    assert said[0].endswith(', its chat template is to be given {"style": "x"}')
    exported = Tokenizer.load(tmp_path / "export", ChatFormat(arguments={"style": "x"}))
    before = Tokenizer.load(base, own_chats)
    assert exported.chat_template == before.chat_template == own_chats.template
    assert exported.stop_ids == before.stop_ids == (before.eos_id, *before.encode("!"))
    save_model(load_model(base), tmp_path / "model", base, chat_format=own_chats)
    assert Tokenizer.load(tmp_path / "model").stop_ids == before.stop_ids
    assert Tokenizer.load(tmp_path / "model").chat_template == own_chats.template


@pytest.mark.parametrize("change", [{"arguments": {"style": "y"}}, {"template": "?"}, {}])
def test_the_chat_format_is_a_part_of_the_base(adapter, own_chats, base, change):
    other = dataclasses.replace(own_chats, **change) if change else ChatFormat()
    edit(adapter / "manifest.json", chat=other.to_json())
    with pytest.raises(
        InputError, match=r"tokenizer_fingerprint: trained on another base: its tok"
    ):
        load_tuned(base, adapter, np.dtype("float32"), None)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (5, "chat: is 5"),
        ({"template": 5}, "chat: template: is 5"),
        ({"arguments": []}, "chat: arguments: is "),
        ({"style": 1}, "chat: style: "),
    ],
)
def test_a_damaged_chat_format(adapter, value, message):
    edit(adapter / "manifest.json", chat=value)
    with pytest.raises(InputError, match=message):
        run_chat_format(adapter)


def test_copies_are_the_same_base(adapter, base, tmp_path):
    convert_checkpoint(base, tmp_path / "converted")
    export_model(tmp_path / "converted", adapter, tmp_path / "export")
    export_model(tmp_path / "export", adapter, tmp_path / "again")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_is_not_finite_is_named(adapter, value):
    tensors = load_file(adapter / "model.safetensors")
    name = expert_names(1, 0)[1]
    tensors[name][3, 2] = value
    save_file(tensors, adapter / "model.safetensors")
    with pytest.raises(InputError, match=f"tensor '{name}' has values that are not finite"):
        load_adapter(adapter)


def test_numbers_that_the_written_type_does_not_hold_are_named(adapter, base, tmp_path):
    tensors = load_file(adapter / "model.safetensors")
    name = expert_names(1, 0)[1]
    tensors[name][3, 2] = np.finfo(np.float32).max  # infinite in bfloat16
    save_file(tensors, adapter / "model.safetensors")
    message = f"{adapter}: .*tensor '{name}' has values that are no finite numbers in bfloat16"
    with pytest.raises(InputError, match=message):
        export_model(base, adapter, tmp_path / "export", "bfloat16")
    with pytest.raises(InputError, match=message):
        load_tuned(base, adapter, "bfloat16", None)
    assert not (tmp_path / "export").exists()
    export_model(base, adapter, tmp_path / "export", "float32")


def test_a_base_that_is_not_finite_is_neither_exported_nor_converted(base, tmp_path):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][0] = np.nan
    shutil.copytree(base, tmp_path / "copy")
    save_file(tensors, tmp_path / "copy" / "model.safetensors")
    message = "copy: tensor 'model.norm.weight' has values that are no"
    with pytest.raises(InputError, match=message):
        export_model(tmp_path / "copy", None, tmp_path / "export")
    with pytest.raises(InputError, match=message):
        convert_checkpoint(tmp_path / "copy", tmp_path / "converted")


def test_a_manifest_that_leads_nowhere_is_not_missing(adapter):
    (adapter / "manifest.json").unlink()
    (adapter / "manifest.json").symlink_to("nowhere")  # as in a pruned cache
    with pytest.raises(InputError, match="manifest.json: cannot be read: No such file"):
        load_adapter(adapter)


def test_a_tensor_with_and_without_prefix_is_named(adapter):
    tensors = load_file(adapter / "model.safetensors")
    name = expert_names(1, 0)[1]
    tensors[name.removeprefix("model.")] = tensors[name] * 2
    save_file(tensors, adapter / "model.safetensors")
    with pytest.raises(InputError, match="are the same tensor"):
        load_adapter(adapter)
