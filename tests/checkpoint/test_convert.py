import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from esft_jax.checkpoint import arrays, converted
from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.checkpoint.source import HuggingFaceSource
from esft_jax.errors import InputError
from esft_jax.sharding import make_mesh, param_shardings
from tests.checkpoint.checkpoints import assert_same, rewrite, save, torch_model


@pytest.fixture(scope="module")
def converted_tiny(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    convert_checkpoint(tiny[1], folder)
    return folder


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".__lock")
    }


def test_loads_the_same_as_its_source(tiny, converted_tiny):
    source, base = load_base(tiny[1], jnp.float32), load_base(converted_tiny, jnp.float32)
    assert_same(source.model, base.model)
    assert base.fingerprint == source.fingerprint
    assert_same(source.model, load_model(converted_tiny, mesh=make_mesh(2, 4)))
    assert_same(load_model(tiny[1], jnp.bfloat16), load_model(converted_tiny, jnp.bfloat16))


def test_gives_back_every_tensor_of_its_source(tiny, converted_tiny):
    source, target = HuggingFaceSource(tiny[1]), load_base(converted_tiny).source
    for name in source.placements:
        np.testing.assert_array_equal(target.tensor(name), source.tensor(name), name)
        assert target.dtype(name) == source.dtype(name)


def test_mixed_types_are_kept_without_loss(tiny, tmp_path):
    def mix(tensors):
        return {
            name: tensor if ".mlp.gate." in name or "layers.1" in name else tensor.bfloat16()
            for name, tensor in tensors.items()
        }

    folder = rewrite(tiny[1], tmp_path / "mixed", mix)
    fingerprint = convert_checkpoint(folder, tmp_path / "converted")
    source, base = load_base(folder, jnp.float32), load_base(tmp_path / "converted", jnp.float32)
    assert_same(source.model, base.model)
    assert fingerprint == source.fingerprint == base.fingerprint
    manifest = json.loads((tmp_path / "converted" / "manifest.json").read_text())
    assert manifest["dtypes"] == ["BF16", "F32"]
    assert base.source.dtype("model.embed_tokens.weight") == jnp.bfloat16
    assert base.source.dtype("model.layers.2.mlp.gate.weight") == np.float32


def test_two_half_types_in_one_parameter_become_float32(tiny, tmp_path):
    def mix(tensors):
        return {
            name: tensor.half() if "layers.1" in name else tensor.bfloat16()
            for name, tensor in tensors.items()
        }

    folder = rewrite(tiny[1], tmp_path / "mixed", mix)
    convert_checkpoint(folder, tmp_path / "converted")
    assert_same(load_model(folder), load_model(tmp_path / "converted"))


def test_orbax_restores_it_onto_a_mesh(tiny, converted_tiny):
    model = load_model(tiny[1])
    mesh = make_mesh(2, 4)
    _, params = nnx.split(model)
    shardings = param_shardings(params, mesh)
    target = nnx.to_pure_dict(
        jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            params,
            shardings,
        )
    )
    found = ocp.StandardCheckpointer().restore(converted_tiny / "params", target)
    assert jax.tree.map(lambda leaf: leaf.sharding, found) == nnx.to_pure_dict(shardings)
    expected = nnx.to_pure_dict(params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    plain = ocp.PyTreeCheckpointer().restore(converted_tiny / "params")
    jax.tree.map(np.testing.assert_array_equal, plain, expected)


def test_a_chunk_is_one_tensor_or_a_part_of_it(tiny, tmp_path, monkeypatch):
    files = HuggingFaceSource(tiny[1]).placements
    convert_checkpoint(tiny[1], tmp_path / "whole")
    chunks = [p for p in (tmp_path / "whole" / "params").glob("*/c/**/*") if p.is_file()]
    assert len([p for p in chunks if "__lock" not in p.name]) == len(files)
    whole = load_model(tmp_path / "whole")
    monkeypatch.setattr(arrays, "_MAX_CHUNK_BYTES", 1000)
    convert_checkpoint(tiny[1], tmp_path / "split")
    chunks = [p for p in (tmp_path / "split" / "params").glob("*/c/**/*") if p.is_file()]
    assert max(p.stat().st_size for p in chunks) <= 1004  # 1000 and a checksum
    assert_same(whole, load_model(tmp_path / "split"))


class Killed(BaseException):
    pass


@pytest.fixture
def unfinished(tiny, tmp_path, monkeypatch):
    """A conversion that died in the middle, half a line of its journal written."""
    digest, last = HuggingFaceSource.digest, list(HuggingFaceSource(tiny[1]).placements)[60]

    def killed(self, name):
        if name == last:
            raise Killed
        return digest(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceSource, "digest", killed)
        with pytest.raises(Killed):
            convert_checkpoint(tiny[1], tmp_path / "target")
    journal = tmp_path / "target" / "conversion-0.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    return tmp_path / "target"


def test_a_killed_conversion_is_refused_then_resumed(tiny, converted_tiny, unfinished, monkeypatch):
    with pytest.raises(InputError, match="unfinished conversion; run .*convert"):
        load_base(unfinished)
    calls, digest = [], HuggingFaceSource.digest

    def count(self, name):
        calls.append(name)
        return digest(self, name)

    monkeypatch.setattr(HuggingFaceSource, "digest", count)
    convert_checkpoint(tiny[1], unfinished)
    assert len(calls) == len(HuggingFaceSource(tiny[1]).placements) - 59
    assert content(unfinished) == content(converted_tiny)


def test_another_source_does_not_complete_it(unfinished, tmp_path):
    other = save(torch_model(seed=1), tmp_path / "other")
    before = content(unfinished)
    with pytest.raises(InputError, match="unfinished conversion of another source"):
        convert_checkpoint(other, unfinished)
    assert content(unfinished) == before


def test_targets_that_hold_something_are_left_alone(tiny, converted_tiny, tmp_path):
    with pytest.raises(InputError, match="is complete already"):
        convert_checkpoint(tiny[1], converted_tiny)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists; expected a new or empty folder"):
        convert_checkpoint(tiny[1], tmp_path)
    assert content(tmp_path) == {"notes.txt": b"mine"}
    with pytest.raises(InputError, match="is a converted checkpoint already"):
        convert_checkpoint(converted_tiny, tmp_path / "new")


def test_a_bad_source_leaves_no_target(tiny, tmp_path):
    bad = rewrite(tiny[1], tmp_path / "bad", lambda t: dict(list(t.items())[1:]))
    with pytest.raises(InputError, match="is missing"):
        convert_checkpoint(bad, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_damage_is_noticed(tiny, tmp_path):
    folder = tmp_path / "target"
    convert_checkpoint(tiny[1], folder)
    down = folder / "params" / "moe_blocks.moe.experts.down"
    chunk = down / "c" / "1" / "2" / "0" / "0"
    data = bytearray(chunk.read_bytes())
    data[100] ^= 1
    chunk.write_bytes(data)
    with pytest.raises(InputError, match=r"experts.down: cannot be read: .*Digest mismatch"):
        load_model(folder)
    chunk.write_bytes(data[:-100])
    with pytest.raises(InputError, match=r"experts.down: cannot be read: .*c/1/2/0/0"):
        load_model(folder)
    chunk.unlink()
    with pytest.raises(InputError, match=r"experts.down: cannot be read: .*c/1/2/0/0.* missing"):
        load_model(folder)
    (down / "zarr.json").unlink()
    with pytest.raises(InputError, match=r"experts.down/zarr.json: cannot be read: No such"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "manifest.json: key 'format': expected"),
        ('{"format": "x"}', "manifest.json: key 'format': expected"),
        (json.dumps({"format": converted.FORMAT}), "manifest.json: source: is missing"),
        ("{", "manifest.json: not valid JSON"),
    ],
)
def test_bad_manifests(tiny, tmp_path, text, message):
    convert_checkpoint(tiny[1], tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_model(tmp_path / "c")


def edit(key, change):
    def damage(folder):
        path = folder / "params" / "moe_blocks.moe.experts.down" / "zarr.json"
        metadata = json.loads(path.read_text())
        metadata[key] = change(metadata[key])
        path.write_text(json.dumps(metadata))

    return damage


def block_chunk(folder):
    chunk = folder / "params" / "moe_blocks.moe.experts.down" / "c" / "1" / "2" / "0" / "0"
    chunk.unlink()
    os.mkfifo(chunk)


def edit_manifest(**changes):
    def damage(folder):
        path = folder / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit("fill_value", lambda _: 0),
            "experts.down/zarr.json: fill_value: is 0; expected what",
        ),
        (edit("codecs", lambda codecs: codecs[:1]), "zarr.json: codecs: is .*; expected what the"),
        (
            edit("codecs", lambda codecs: [{"name": "bytes", "configuration": {"endian": "big"}}]),
            "zarr.json: codecs: is",
        ),
        (edit("data_type", lambda _: "int32"), "data_type: 'int32'; manifest.json says float32"),
        (edit("data_type", lambda _: ["float32"]), r"data_type: \['float32'\]; manifest.json says"),
        (edit("chunk_grid", lambda g: g | {"name": "other"}), "zarr.json: chunk_grid: is"),
        (edit("shape", lambda s: [s[0] + 1, *s[1:]]), r"shape \[3, 8, .* expects \[2, 8, "),
        (block_chunk, "c/1/2/0/0: is no regular file; expected a file"),
        (edit_manifest(fingerprint=3), "manifest.json: fingerprint: is 3; expected a valid string"),
        (edit_manifest(dtypes=["I8"]), "manifest.json: dtypes.0: is 'I8'; expected 'BF16'"),
        (edit_manifest(more=1), "manifest.json: more: is no key that is known here"),
        (edit("zarr_format", lambda _: 2), "missing or damaged: .*received: 2$"),
    ],
)
def test_what_the_conversion_did_not_write_is_named(converted_tiny, tmp_path, damage, message):
    folder = shutil.copytree(converted_tiny, tmp_path / "copy")
    damage(folder)
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"tensor": "x"}', "conversion.jsonl:2: sha256: is missing"),
        (b'{"tensor": "x", "sha256": 5}', "conversion.jsonl:2: sha256: is 5; expected a valid"),
        (b'{"tensor": "lm_head.weight", "sha256": "x"}', "conversion.jsonl:2: sha256: is 'x'"),
        (b'{"tensor": "x", "sha256": "%s"}' % (b"0" * 64), "jsonl:2: tensor: 'x' is none of"),
        (b"[]", r"conversion.jsonl:2: is \[\]"),
        (b"{", "conversion.jsonl:2: not valid JSON"),
        (b'"\xff"', "conversion.jsonl:2: byte 1 of the line is not UTF-8"),
        (b'{"source": null}', "conversion.jsonl:2: source: is None"),
    ],
)
def test_a_broken_journal_is_named(tiny, unfinished, line, message):
    journal = unfinished / "conversion.jsonl"
    first, *rest = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([first, line, b"\n", *rest]))
    before = content(unfinished)
    with pytest.raises(InputError, match=message):
        convert_checkpoint(tiny[1], unfinished)
    assert content(unfinished) == before


def test_links_and_hidden_files_at_the_target(tiny, converted_tiny, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere")
    with pytest.raises(InputError, match="link: is a link; expected a new or empty folder"):
        convert_checkpoint(tiny[1], tmp_path / "link")
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / ".DS_Store").touch()
    convert_checkpoint(tiny[1], tmp_path / "target")
    assert content(tmp_path / "target") == content(converted_tiny) | {".DS_Store": b""}


def test_a_link_in_an_unfinished_conversion(tiny, unfinished, tmp_path):
    shutil.move(unfinished / "params", tmp_path / "elsewhere")
    (unfinished / "params").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="target/params: is a link"):
        convert_checkpoint(tiny[1], unfinished)
