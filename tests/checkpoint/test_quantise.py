"""Matrices that are kept quantised beside a converted checkpoint."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax.checkpoint import quantise as writer
from esft_jax.checkpoint import quantised as reader
from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.load import load_base, open_source
from esft_jax.checkpoint.quantise import describe_quantisation, quantise_converted
from esft_jax.errors import InputError
from esft_jax.model.params import Role
from esft_jax.ops.quantisation import Quantisation
from esft_jax.ops.quantised import Quantised
from esft_jax.sharding import make_mesh
from tests.checkpoint.checkpoints import expert_names, leaves, rewrite, save, torch_model

HOW = Quantisation(experts="int4", rest="int8", group_size=16)
OTHER = Quantisation(experts="mxfp4")
FOLDERS = ["experts-int4-16", "rest-int8-16"]


@pytest.fixture(scope="module")
def source(tiny, tmp_path_factory):
    """One expert is nothing but zeros, as padding is: its chunks must be written, too."""

    def clear(tensors):
        return tensors | {name: 0 * tensors[name] for name in expert_names(2, 5)}

    return rewrite(tiny[1], tmp_path_factory.mktemp("hf") / "model", clear)


@pytest.fixture(scope="module")
def kept(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept") / "model"
    convert_checkpoint(source, folder, quantisations=[HOW])
    return folder


def content(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".__lock")
    }


def load(folder, how=HOW, mesh=None, trained=frozenset()):
    return leaves(load_base(folder, jnp.float32, mesh, how, trained).model)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert jax.tree.structure(leaf) == jax.tree.structure(expected[path])
        jax.tree.map(np.testing.assert_array_equal, leaf, expected[path])


@pytest.fixture
def rounding(monkeypatch):
    """Counts matrices that are quantised."""
    calls, quantise = [], reader.quantise

    def count(*args):
        calls.append(args)
        return quantise(*args)

    monkeypatch.setattr(reader, "quantise", count)
    return calls


def test_it_loads_what_is_kept_as_it_would_be_quantised(source, kept, rounding):
    expected = load(source)
    assert rounding
    rounding.clear()
    found = load(kept)
    assert_equal(found, expected)
    assert sum(isinstance(leaf, Quantised) for leaf in found.values()) == 14
    assert_equal(load(kept, mesh=make_mesh(2, 4)), expected)
    assert not rounding
    assert describe_quantisation(open_source(kept), HOW) == [
        f"quantise.{name.partition('-')[0]}: read from {kept / 'quantised' / name}"
        for name in FOLDERS
    ]


def test_the_host_quantises(source, monkeypatch):
    """Accelerators may round otherwise."""
    made, quantise = [], reader.quantise
    monkeypatch.setattr(reader, "quantise", lambda *args: made.append(quantise(*args)) or made[-1])
    opened = open_source(source)
    path, like = next(iter(reader.quantised_params(opened.config, HOW).items()))
    with jax.default_device(jax.devices()[3]):
        reader.quantised_reader(opened, path, like)((0,) * (like.ndim - 2))
    assert made[0].codes.devices() == {jax.local_devices(backend="cpu")[0]}


def test_parts_that_are_trained_are_read_in_full_precision(source, kept, rounding):
    trained = frozenset({Role.ATTENTION})
    found = load(kept, trained=trained)
    assert not rounding
    assert_equal(found, load(source, trained=trained))
    exact = load(source, None)
    path = next(path for path in exact if path[-1] == "kv_up")
    np.testing.assert_array_equal(found[path], exact[path])


def test_other_settings_are_quantised_while_loading_and_it_says_so(source, kept, rounding):
    how = Quantisation(experts="int4", rest="int8", group_size=32)
    assert_equal(load(kept, how), load(source, how))
    assert rounding
    (line, _) = describe_quantisation(open_source(kept), how)
    assert line == (
        f"quantise.experts: quantised while loading; {kept} keeps {', '.join(FOLDERS)}, and no "
        "experts-int4-32 (`convert --quantise`)"
    )
    assert describe_quantisation(open_source(source), how) == []


def test_settings_lie_side_by_side(source, kept, tmp_path, monkeypatch):
    folder = shutil.copytree(kept, tmp_path / "copy")
    before = content(folder)
    quantise_converted(folder, OTHER)
    after = content(folder)
    assert before.items() < after.items()
    assert {name.split("/")[:2][1] for name in after.keys() - before.keys()} == {"experts-mxfp4-32"}
    assert_equal(load(folder, OTHER), load(source, OTHER))
    # What is there already is not made again.
    monkeypatch.setattr(writer, "_keep", None)
    quantise_converted(folder, OTHER)
    convert_checkpoint(source, folder, quantisations=[HOW, OTHER])
    assert content(folder) == after


def test_manifests_say_what_is_there(kept):
    base = json.loads((kept / "manifest.json").read_text())
    assert "quantised" not in base  # older versions read the base beside it
    found = json.loads((kept / "quantised" / FOLDERS[0] / "manifest.json").read_text())
    assert found.pop("fingerprint")
    assert found == {
        "format": "esft_jax quantised weights, version 1",
        "base_fingerprint": base["fingerprint"],
        "part": "experts",
        "scheme": "int4",
        "group_size": 16,
        "parameters": ["moe_blocks.moe.experts.down", "moe_blocks.moe.experts.gate_up"],
    }


class Killed(BaseException):
    pass


def test_a_kill_leaves_nothing_that_counts(source, kept, tmp_path, monkeypatch):
    folder, calls, write = tmp_path / "model", [], writer.write_array

    def killed(*args):
        calls.append(args)
        if len(calls) == 20:
            raise Killed
        write(*args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_array", killed)
        with pytest.raises(Killed):
            convert_checkpoint(source, folder, quantisations=[HOW])
    part = folder / "quantised" / FOLDERS[0]
    noted = (part / "conversion-0.jsonl").read_bytes()
    (part / "conversion-0.jsonl").write_bytes(noted[:-20])  # half a line
    assert_equal(load(folder), load(source))
    (line, _) = describe_quantisation(open_source(folder), HOW)
    assert f"{folder} keeps nothing quantised" in line
    calls.clear()
    monkeypatch.setattr(writer, "write_array", lambda *args: (calls.append(args), write(*args)))
    convert_checkpoint(source, folder, quantisations=[HOW])
    matrices = 2 * 2 * 8 + 3 * 4 + 2 * 3  # of experts, attention, and MLPs
    assert len(calls) == 2 * (matrices - (noted.count(b"\n") - 1))
    assert content(folder) == content(kept)


def test_a_source_of_other_weights(kept, source, tmp_path):
    other = save(torch_model(seed=1), tmp_path / "other")
    before = content(kept)
    with pytest.raises(InputError, match="is a conversion of .*, with other weights than"):
        convert_checkpoint(other, kept, quantisations=[HOW])
    # The same weights under another name are no others.
    convert_checkpoint(source, kept, "another/name", [HOW])
    assert content(kept) == before


def test_what_cannot_be_quantised_so_is_known_before_anything_is_written(tiny, tmp_path):
    with pytest.raises(InputError, match="quantise.experts: fp8 keeps what is published so"):
        convert_checkpoint(tiny[1], tmp_path / "new", quantisations=[Quantisation(experts="fp8")])
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="new: is no converted checkpoint; expected one, or a"):
        quantise_converted(tmp_path / "new", HOW)


def edit(name, **changes):
    def damage(folder):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


DOWN = "moe_blocks.moe.experts.down"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit("manifest.json", format="x"), "manifest.json: key 'format': expected"),
        (edit("manifest.json", scheme="int5"), "manifest.json: scheme: is 'int5'"),
        (
            edit("manifest.json", base_fingerprint="x"),
            "base_fingerprint: these are not of the base",
        ),
        (
            lambda f: (f / f"{DOWN}.codes/c/1/2/0/0").unlink(),
            "down.codes: cannot be read: .*missing",
        ),
        (lambda f: shutil.rmtree(f / f"{DOWN}.scales"), "down.scales/zarr.json: cannot be read"),
        (
            edit(f"{DOWN}.codes/zarr.json", data_type="int8"),
            "codes/zarr.json: data_type: 'int8'; manifest.json says uint8",
        ),
        (edit(f"{DOWN}.scales/zarr.json", fill_value=1), "scales/zarr.json: fill_value: is 1"),
    ],
)
def test_damage_is_noticed(kept, tmp_path, damage, message):
    folder = shutil.copytree(kept, tmp_path / "copy")
    damage(folder / "quantised" / FOLDERS[0])
    with pytest.raises(InputError, match=message):
        load(folder)
