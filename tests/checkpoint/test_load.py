import json
import os
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.utils import filter_repo_objects

from esft_jax.checkpoint.load import load_base, load_model, local_folder
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.model import Transformer
from esft_jax.model.rope import inverse_frequencies
from esft_jax.sharding import make_mesh, param_shardings
from tests.checkpoint.checkpoints import (
    assert_same,
    leaves,
    logits,
    rewrite,
    save,
    torch_logits,
    torch_model,
)
from tests.yardstick import safetensors, torch


@pytest.mark.parametrize(
    ("changes", "options"),
    [({}, {}), ({"q_lora_rank": 12, "tie_word_embeddings": True}, {"max_shard_size": "30KB"})],
    ids=["lite", "q_lora-tied-sharded"],
)
def test_logits_are_those_of_transformers(tmp_path, tokens, changes, options):
    model = torch_model(**changes)
    folder = save(model, tmp_path, **options)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(options)
    found = logits(load_model(folder), tokens)
    np.testing.assert_allclose(found, torch_logits(model, tokens), atol=1e-4)


def test_a_sharded_load_reads_only_what_a_device_holds(tiny, monkeypatch):
    _, folder = tiny
    whole, base = load_model(folder), load_base(folder, jnp.float32)
    read = []
    tensor = TensorFiles.read

    def spy(self, name, index=()):
        found = tensor(self, name, index)
        read.append((name, found))
        return found

    monkeypatch.setattr(TensorFiles, "read", spy)
    mesh = make_mesh(2, 4)
    sharded = load_model(folder, mesh=mesh)
    assert_same(whole, sharded)
    _, params = nnx.split(sharded)
    for param, expected in zip(
        jax.tree.leaves(params), jax.tree.leaves(param_shardings(params, mesh)), strict=True
    ):
        assert param.sharding == expected
    shapes = [part.shape for name, part in read if name == "model.embed_tokens.weight"]
    assert shapes == [(96, 4)] * 8
    # Experts lie on two devices each, norms on eight; nothing is read twice.
    stored = sum(base.source.num_bytes(name) for name in base.source.placements)
    assert sum(part.nbytes for _, part in read) == stored


def test_parameters_take_the_type_asked_for(tiny):
    model = load_model(tiny[1], dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in leaves(model).values()} == {jnp.dtype(jnp.bfloat16)}
    assert model.dtype == jnp.bfloat16
    exact = leaves(load_model(tiny[1]))
    for path, leaf in leaves(model).items():
        np.testing.assert_array_equal(leaf, exact[path].astype(jnp.bfloat16))


def test_fused_experts_load_the_same_and_have_the_same_fingerprint(tiny, tmp_path):
    model, folder = tiny
    experts = {n: t for n, t in model.state_dict().items() if ".mlp.experts." in n}

    def fuse(tensors):
        return {n: t for n, t in tensors.items() if ".mlp.experts." not in n} | experts

    base, other = load_base(folder), load_base(rewrite(folder, tmp_path / "fused", fuse))
    assert_same(base.model, other.model)
    assert base.fingerprint == other.fingerprint


def test_the_fingerprint_ignores_shards_and_sees_every_value(tiny, tmp_path):
    model, folder = tiny
    expected = load_base(folder).fingerprint
    sharded = save(model, tmp_path / "sharded", max_shard_size="30KB")
    assert load_base(sharded).fingerprint == expected

    def touch(tensors):
        tensors["model.layers.2.mlp.experts.7.down_proj.weight"][-1, -1] += 1
        return tensors

    assert load_base(rewrite(folder, tmp_path / "touched", touch)).fingerprint != expected


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_tied_head_and_rotary_buffers_are_tolerated(tmp_path, stored):
    model = torch_model(tie_word_embeddings=True).to(stored)
    folder = save(model, tmp_path / "tied")
    rope = load_model_config(folder).rope

    def add(tensors):
        plain, yarn = inverse_frequencies(replace(rope, yarn=None)), inverse_frequencies(rope)
        tensors["lm_head.weight"] = model.lm_head.weight.detach().float()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.tensor(plain).to(stored)
        tensors["model.rotary_emb.inv_freq"] = torch.tensor(yarn).to(stored)
        return {name: tensor.clone() for name, tensor in tensors.items()}

    more = rewrite(folder, tmp_path / "more", add)
    assert load_base(more).fingerprint == load_base(folder).fingerprint


BUFFER = "model.layers.2.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("lm_head.weight", torch.zeros_like, "differs from 'model.embed_tokens.weight'"),
        ("lm_head.weight", lambda e: e * (1 + 1e-6), "differs from 'model.embed_tokens.weight'"),
        ("lm_head.weight", lambda e: e[:-1], r"'lm_head.weight' has shape \[95, 32\]"),
        (BUFFER, lambda e: e[0, :4], "differs from what rope_theta"),
        (BUFFER, lambda e: 1e6 ** (-torch.arange(0, 8, 2) / 8), "differs from what rope_theta"),
        (BUFFER.replace("2", "7"), lambda e: e[0, :4], "unexpected tensor"),
        ("model.layers.3.mlp.gate.weight", lambda e: e[:8], "unexpected tensor"),
        ("model.layers.1.mlp.gate.e_score_correction_bias", lambda e: e[0, :8], "unexpected tenso"),
    ],
)
def test_what_says_something_else_than_the_model_is_named(tmp_path, name, make, message):
    folder = save(torch_model(tie_word_embeddings=True), tmp_path / "tied")

    def add(tensors):
        extra = make(tensors["model.embed_tokens.weight"].clone())
        return tensors | {name: extra.clone().contiguous()}

    bad = rewrite(folder, tmp_path / "bad", add)
    with pytest.raises(InputError, match=message):
        load_model(bad)


def test_experts_fused_and_one_by_one_are_named(tiny, tmp_path):
    model, folder = tiny
    fused = "model.layers.1.mlp.experts.down_proj"

    def add(tensors):
        return tensors | {fused: model.state_dict()[fused].clone()}

    twice = r"experts.\d.down_proj.weight' is there twice: 'model.layers.1.mlp.experts.down_proj'"
    with pytest.raises(InputError, match=twice):
        load_model(rewrite(folder, tmp_path / "both", add))


def test_hidden_files_are_nobodys(tiny, tmp_path):
    folder = rewrite(tiny[1], tmp_path / "copy", lambda tensors: tensors)
    for name in ("._model.safetensors", "._model.safetensors.index.json", ".DS_Store"):
        (folder / name).write_bytes(b"\0\5\x16\7")
    assert_same(load_model(folder), load_model(tiny[1]))


def test_of_several_files_the_usual_one_counts(tiny, tmp_path):
    """As for `transformers`; others are of another tool, if they say nothing of its tensors."""
    folder = rewrite(tiny[1], tmp_path / "copy", lambda tensors: tensors)
    safetensors.save_file({"layers.0.wq": torch.zeros(2)}, folder / "consolidated.safetensors")
    assert_same(load_model(folder), load_model(tiny[1]))
    shutil.copy(folder / "model.safetensors", folder / "best.safetensors")
    with pytest.raises(InputError, match="best.safetensors: has tensor 'lm_head.weight', as"):
        load_model(folder)


GATE = "model.layers.1.mlp.experts.3.gate_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {n: v for n, v in t.items() if n != GATE}, f"tensor '{GATE}' is missing"),
        (lambda t: t | {"model.extra": t[GATE].clone()}, "unexpected tensor 'model.extra'"),
        (
            lambda t: t | {GATE: t[GATE].T.contiguous()},
            rf"model.safetensors: tensor '{GATE}' has shape \[32, 16\]; "
            r"config.json expects \[16, 32\]",
        ),
        (lambda t: t | {GATE: t[GATE].double()}, f"tensor '{GATE}' has type F64; expected BF16"),
    ],
    ids=["missing", "unexpected", "misshapen", "wrong-type"],
)
def test_tensors_that_do_not_fit_are_named(tiny, tmp_path, change, message):
    folder = rewrite(tiny[1], tmp_path / "bad", change)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def truncate(folder):
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-10])


def flip_header(folder):
    path = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[20] ^= 0x80
    path.write_bytes(data)


def pickle_only(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def point_outside(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "../x.safetensors"
    path.write_text(json.dumps(index))


def misplace(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def unlist(folder):
    edit_index(folder, lambda listed: listed.pop("model.norm.weight"))


def invent(folder):
    edit_index(folder, lambda listed: listed.update(x="model-00001-of-00003.safetensors"))


def replace_second(folder):
    path = next(folder.glob("model-00002*"))
    path.unlink()
    return path


def block(folder):
    os.mkfifo(replace_second(folder))


def point(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    replace_second(folder).write_text(pointer)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: next(f.glob("model-00002*")).unlink(),
            "model-00002-of-00003.safetensors: missing shard; .*index.json lists it",
        ),
        (truncate, "model-00003-of-00003.safetensors: damaged or truncated safetensors"),
        (flip_header, "model-00002-of-00003.safetensors: damaged or truncated safetensors"),
        (pickle_only, "only pytorch_model.bin; pickled weights are not read"),
        (point_outside, "index.json: weight_map: model.norm.weight: '../x.safetensors' is no file"),
        (
            lambda f: edit_index(f, lambda listed: listed.update({"model.norm.weight": ".."})),
            "weight_map: model.norm.weight: '..' is no file",
        ),
        (
            lambda f: edit_index(f, lambda listed: listed.update(x="x" * 300)),
            "x: missing shard; .*index.json lists it",
        ),
        (misplace, "00003.safetensors: has tensor 'model.norm.weight'; .*lists it in model-00001"),
        (unlist, "has tensor 'model.norm.weight'; .*index.json does not list it"),
        (invent, "00001-of-00003.safetensors: tensor 'x' is missing; .*index.json lists it here"),
        (
            lambda f: shutil.copy(next(f.glob("model-00002*")), f / "old.safetensors"),
            "old.safetensors: has tensor '.*', as .*-00002-of-00003.safetensors has; expected",
        ),
        (block, "model-00002-of-00003.safetensors: is no regular file; expected a file"),
        (point, "model-00002-of-00003.safetensors: is a git-lfs pointer"),
        (lambda f: (f / "model.safetensors.index.json").unlink(), "3 safetensors files without"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{"),
            "index.json: not valid JSON",
        ),
        (lambda f: (f / "config.json").unlink(), "config.json: not found"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    folder = save(torch_model(), tmp_path / "sharded", max_shard_size="100KB")
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder)


def test_a_shard_that_is_cut_while_it_is_open_is_named(tiny, tmp_path):
    base = load_base(rewrite(tiny[1], tmp_path / "copy", lambda tensors: tensors))
    weights = tmp_path / "copy" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    with pytest.raises(InputError, match=r"model.safetensors: tensor .* cannot be read"):
        _ = base.fingerprint


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nobody/nothing"])
def test_a_path_that_is_nothing(path):
    with pytest.raises(InputError, match=path):
        load_model(path)


def test_no_weights_are_ever_initialised(tiny, monkeypatch):
    draw = jax.random.normal

    def normal(key, *args):
        assert isinstance(key, jax.core.Tracer), "drawn, not only traced"
        return draw(key, *args)

    monkeypatch.setattr(jax.random, "normal", normal)
    assert isinstance(load_model(tiny[1]), Transformer)


def test_folders_in_a_hub_repository_are_left_there(tmp_path, monkeypatch):
    """Some hold the same weights again, in the layout of another program."""
    kept, fetched = ["config.json", "model.safetensors", "additional_chat_templates/a.jinja"], []

    def download(name, **patterns):
        fetched.extend(filter_repo_objects([*kept, "original/model.safetensors"], **patterns))
        return tmp_path

    monkeypatch.setattr("esft_jax.checkpoint.load.snapshot_download", download)
    local_folder("owner/name")
    assert fetched == kept
