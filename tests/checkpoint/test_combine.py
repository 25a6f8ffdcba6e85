"""Several adapters of one base: combined, compared, listed, and taken out of a model again."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapters import main
from esft_jax.checkpoint.adapter import load_adapter, save_adapter, trained_names
from esft_jax.checkpoint.combine import combine_adapters, compare_adapters
from esft_jax.checkpoint.export import export_model, undo_adapter
from esft_jax.checkpoint.load import load_base
from esft_jax.checkpoint.peft import save_lora
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.errors import InputError
from esft_jax.evaluation.run import adapter_sha256
from tests.checkpoint.checkpoints import expert_names, save, torch_model, with_factors

FIRST, SECOND = ExpertConfig({1: (5, 0), 2: (3,)}), ExpertConfig({1: (0, 2)}, ("router",))
APART = ExpertConfig({2: (1,)})


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(save(torch_model(), tmp_path_factory.mktemp("base") / "base"), jnp.float32)


def write(folder, base, experts, seed, dtype=np.float32, **more):
    rng = np.random.default_rng(seed)
    names = trained_names(base.source.config, experts, "test")
    placements = base.source.placements
    tensors = {n: rng.normal(size=placements[n].shape).astype(dtype) for n in names}
    identity = {
        "base_fingerprint": base.fingerprint,
        "config_fingerprint": base.source.config.fingerprint,
    }
    save_adapter(
        folder, tensors.items(), experts, identity | {"dtype": np.dtype(dtype).name} | more
    )
    return folder


@pytest.fixture
def adapters(base, tmp_path):
    return [
        write(tmp_path / name, base, experts, seed)
        for seed, (name, experts) in enumerate(
            {"first": FIRST, "second": SECOND, "apart": APART}.items()
        )
    ]


def tensors_of(folder):
    return load_file(folder / "model.safetensors")


def test_those_that_share_nothing(base, adapters, tmp_path):
    first, _, apart = adapters
    experts = combine_adapters([first, apart], tmp_path / "both")
    assert experts == ExpertConfig({1: (5, 0), 2: (3, 1)})
    both = load_adapter(tmp_path / "both")
    both.check(base.source.config, base.fingerprint)
    found = tensors_of(tmp_path / "both")
    expected = tensors_of(first) | tensors_of(apart)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_array_equal(tensor, expected[name])
    parts = both.manifest["combined"]["adapters"]
    assert [part["manifest"]["base_fingerprint"] for part in parts] == [base.fingerprint] * 2
    assert both.manifest["dtype"] == "float32"


@pytest.mark.parametrize("weights", [None, [3.0, 0.5]])
@pytest.mark.parametrize("method", ["mean", "arithmetic"])
def test_those_that_overlap(base, adapters, tmp_path, method, weights):
    first, second, _ = adapters
    with pytest.raises(
        InputError, match=r"0\.down_proj.*as .*first has \(3 in all\); expected --m"
    ):
        combine_adapters([first, second], tmp_path / "both")
    assert not (tmp_path / "both").exists()
    experts = combine_adapters(
        [first, second], tmp_path / "both", method, weights, base.source.folder
    )
    assert experts == ExpertConfig({1: (5, 0, 2), 2: (3,)}, ("router",))
    one, other, found = (tensors_of(f) for f in (first, second, tmp_path / "both"))
    a, b = weights or (1, 1)
    assert found.keys() == one.keys() | other.keys()
    for name, tensor in found.items():
        held = [(w, side[name]) for w, side in ((a, one), (b, other)) if name in side]
        start = base.source.tensor(name)
        if method == "mean":
            expected = sum(w * t for w, t in held) / sum(w for w, _ in held)
        else:
            expected = start + sum(w * (t - start) for w, t in held)
        np.testing.assert_allclose(tensor, expected, atol=1e-5)
    load_adapter(tmp_path / "both").check(base.source.config, base.fingerprint)


def test_types_that_differ(base, adapters, tmp_path):
    half = write(tmp_path / "half", base, SECOND, 7, jnp.bfloat16)
    combine_adapters([adapters[0], half], tmp_path / "both", "mean")
    both = load_adapter(tmp_path / "both")
    kinds = {name: both.tensors.dtype(name).name for name in both.tensors}
    assert kinds[expert_names(1, 0)[0]] == "float32"
    assert kinds[expert_names(1, 2)[0]] == "bfloat16"
    assert "dtype" not in both.manifest


def test_refusals(base, adapters, tmp_path):
    first, second, apart = adapters
    target = tmp_path / "new"

    def refused(match, folders, *more):
        with pytest.raises(InputError, match=match):
            combine_adapters(folders, target, *more)
        assert not target.exists()

    refused("two or more", [first])
    refused("--base: missing; arithmetic", [first, apart], "arithmetic")
    refused("--weights: union takes", [first, apart], "union", [1, 2])
    refused("--weights: 1 for 2 adapters", [first, apart], "mean", [1])
    refused("--weights: -1; expected positive", [first, second], "mean", [1, -1])
    other = write(tmp_path / "other", base, APART, 3, base_fingerprint="0" * 64)
    refused("other.manifest.json: base_fingerprint: beside .*first, another", [first, other])
    chats = write(tmp_path / "chats", base, APART, 3, chat={"stop_token": "x"})
    refused("chat: the adapters were trained on different formats", [first, chats])
    released = shutil.copytree(apart, tmp_path / "released")
    (released / "manifest.json").unlink()
    refused("--base: missing; no adapter has a manifest", [released, released], "mean")
    combine_adapters([first, released], target)
    shutil.rmtree(target)
    big = ExpertConfig({2: (1,)})
    name = expert_names(2, 1)[0]
    changed = tensors_of(apart) | {name: np.full(tensors_of(apart)[name].shape, 3e38, np.float32)}
    for folder in ("a", "b"):
        save_adapter(tmp_path / folder, changed.items(), big, load_adapter(apart).manifest)
    sides = [tmp_path / "a", tmp_path / "b"]
    refused(f"{name}.*no finite numbers in float32", sides, "arithmetic", None, base.source.folder)


def test_differences(base, adapters):
    found = compare_adapters(*adapters[:2])
    assert (found.only_first, found.both) == ({1: [5], 2: [3]}, {1: [0]})
    assert (found.only_second, found.also) == ({1: [2]}, ((), ("router",)))
    one, other = map(tensors_of, adapters[:2])
    names = expert_names(1, 0)
    distance = sum(((one[n] - other[n]) ** 2).sum() for n in names)
    expected = np.sqrt(distance / sum((one[n] ** 2).sum() for n in names))
    assert found.change == pytest.approx(expected, rel=1e-6)
    assert compare_adapters(adapters[0], adapters[2]).change is None


def test_an_adapter_is_taken_out_of_a_model_again(base, adapters, tmp_path):
    first, _, apart = adapters
    origin = base.source.folder
    combine_adapters([first, apart], tmp_path / "both")
    export_model(origin, tmp_path / "both", tmp_path / "merged")
    undo_adapter(tmp_path / "merged", first, origin, tmp_path / "left")
    export_model(origin, apart, tmp_path / "expected")
    found, expected = (TensorFiles(tmp_path / name) for name in ("left", "expected"))
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found.read(name), expected.read(name))
    with pytest.raises(InputError, match="left: tensor .* does not hold the numbers of .*first"):
        undo_adapter(tmp_path / "left", first, origin, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_the_command(base, adapters, tmp_path, capsys):
    first, second, apart = map(str, adapters)
    assert main(["list", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("first", "second", "apart", "3 experts", "router"))
    assert main(["list", str(base.source.folder)]) == 0
    assert "no adapters in" in capsys.readouterr().out
    assert main(["list", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err

    scores = tmp_path / "evaluation" / "adapter-1" / "task-1" / "scores.json"
    scores.parent.mkdir(parents=True)
    scores.write_text(json.dumps({"adapter_sha256": adapter_sha256(adapters[0])}))
    measure = {"name": "task", "measure": "intent, %", "before": 1.0, "after": 60.5, "change": 59.5}
    comparison = {"before": "base-1", "after": "adapter-1", "measures": [measure]}
    (tmp_path / "evaluation" / "comparison-1.json").write_text(json.dumps(comparison))
    assert main(["show", first]) == 0
    printed = capsys.readouterr().out
    assert "layer 1: experts 5 0" in printed and base.fingerprint in printed
    assert "task: intent, %: 1 before, 60.5 after" in printed
    assert main(["show", apart]) == 0
    assert "intent" not in capsys.readouterr().out

    assert main(["diff", first, second]) == 0
    printed = capsys.readouterr().out
    assert "only first: 2 experts, both: 1 experts, only second: 1 experts" in printed
    assert main(["combine", first, second, "--to", str(tmp_path / "both"), "--method", "mean"]) == 0
    assert "4 experts of 2 adapters" in capsys.readouterr().out
    assert main(["show", str(tmp_path / "both")]) == 0
    assert f"combined (mean): 1 of {first}" in capsys.readouterr().out
    assert main(["combine", first, apart, "--to", str(tmp_path / "both")]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err

    origin, merged, left = (str(p) for p in (base.source.folder, tmp_path / "m", tmp_path / "l"))
    export_model(origin, first, merged)
    assert main(["undo", first, "--model", merged, "--base", origin, "--to", left]) == 0
    assert f"Took {first} out of {merged}" in capsys.readouterr().out
    assert main(["drop", first]) == 2
    assert "invalid choice: 'drop'" in capsys.readouterr().err


def test_low_rank_adapters_are_no_tuned_tensors(base, adapters, tmp_path):
    parts, lora = with_factors(load_base(base.source.folder, jnp.float32), ("attention",))
    manifest = {"base_fingerprint": base.fingerprint, "base_model": "base"}
    save_lora(tmp_path / "lora", nnx.merge(*parts), lora, manifest)
    with pytest.raises(InputError, match="lora: is of low rank"):
        combine_adapters([adapters[0], tmp_path / "lora"], tmp_path / "both")
