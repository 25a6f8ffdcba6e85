"""LoRA beside `peft`: the same gradients and logits, adapters that both read."""

import json
import shutil
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from esft_jax.checkpoint.adapter import apply_adapter, load_adapter
from esft_jax.checkpoint.export import export_model
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.checkpoint.peft import save_lora
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.errors import InputError
from esft_jax.families import tensor_table
from esft_jax.sharding import make_mesh
from tests.checkpoint.checkpoints import (
    assert_same,
    leaves,
    logits,
    torch_logits,
    torch_model,
    with_factors,
)
from tests.yardstick import torch

peft = pytest.importorskip("peft")

MODULES = ("attention", "dense_mlps", "shared_experts")
TARGETS = {
    "attention": ("attention",),
    "modules": MODULES,
    "shared-experts": ("shared_experts",),
    "experts": ("experts",),
    "all": (*MODULES, "experts"),
    "selected": (*MODULES, "selected_experts"),
}


def save(folder, base, targets):
    parts, lora = with_factors(base, targets)
    manifest = {"base_fingerprint": base.fingerprint, "base_model": "base", "step": 7}
    save_lora(folder, nnx.merge(*parts), lora, manifest)


def read(folder):
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory):
    """A folder with an adapter for each of some targets."""
    folder = tmp_path_factory.mktemp("lora")
    for kind in ("all", "selected"):
        save(folder / kind, load_base(tiny[1], jnp.float32), TARGETS[kind])
    return folder


@pytest.fixture
def copy(adapters, tmp_path):
    return shutil.copytree(adapters / "selected", tmp_path / "copy")


@pytest.fixture(scope="module")
def padded(adapters, tmp_path_factory):
    """The adapter of selected experts as one of all, for `peft`: updates of 0 for the others."""
    folder = tmp_path_factory.mktemp("padded")
    shutil.copytree(adapters / "all", folder, dirs_exist_ok=True)
    own, every = read(adapters / "selected"), read(adapters / "all")
    save_file(
        {name: own.get(name, np.zeros_like(tensor)) for name, tensor in every.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def our_gradients(parts, lora, tokens, folder):
    """Logits, and the gradients of the factors as a stored adapter."""
    graph, tuned, frozen = parts

    @jax.jit
    def call(tuned, frozen, tokens):
        def loss(tuned):
            logits = nnx.merge(graph, tuned, frozen)(tokens).logits
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(logits), jnp.roll(tokens, -1)[..., None], -1
            )
            return -chosen.mean(), logits

        return jax.grad(loss, has_aux=True)(tuned)

    gradients, logits = call(tuned, frozen, tokens)
    manifest = {"base_fingerprint": "", "base_model": ""}
    save_lora(folder, nnx.merge(graph, gradients, frozen), lora, manifest)
    return logits, read(folder)


def their_gradients(folder, tokens):
    """The same of `peft`, fused experts taken apart."""
    model = peft.PeftModel.from_pretrained(torch_model(), folder, is_trainable=True)
    tokens = torch.tensor(tokens)
    logits = model(tokens).logits
    targets = tokens.flatten().roll(-1)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets).backward()
    found = {}
    for name, factor in model.named_parameters():
        if not factor.requires_grad:
            continue
        stored, gradient = name.replace(".default.", "."), factor.grad.numpy()
        if ".mlp.experts." not in stored:
            found[stored] = gradient
            continue
        fused = ".base_layer." in stored
        prefix = stored[: stored.index(".mlp.experts.") + len(".mlp.experts.")]
        kinds, side = ("gate_proj", "up_proj") if fused else ("down_proj",), stored[-8]
        for expert in range(8):
            if side == "A":
                parts = np.split(gradient.reshape(8, -1, gradient.shape[1])[expert], len(kinds))
            else:
                own = gradient.reshape(len(gradient), -1, 8)[..., expert]
                rows = np.split(own, len(kinds))
                parts = [np.split(r, len(kinds), 1)[i] for i, r in enumerate(rows)]
            for kind, part in zip(kinds, parts, strict=True):
                found[f"{prefix}{expert}.{kind}.lora_{side}.weight"] = part
    return logits.detach().numpy(), found


def check_against_peft(ours, theirs, tiny, tokens):
    logits, gradients = ours
    assert np.abs(logits - torch_logits(tiny[0], tokens)).max() > 0.1  # the updates matter
    np.testing.assert_allclose(logits, theirs[0], atol=1e-4)
    for name, gradient in gradients.items():
        scale = np.abs(theirs[1][name]).max()
        assert scale > 0 or ".mlp.experts." in name  # an expert without tokens
        assert np.abs(gradient - theirs[1][name]).max() <= 1e-4 * scale, name


def factors_of(tiny, kind):
    return with_factors(load_base(tiny[1], jnp.float32), TARGETS[kind])


def test_gradients_and_logits_are_those_of_peft(tiny, tokens, padded, tmp_path):
    theirs = their_gradients(padded, tokens)
    ours = our_gradients(*factors_of(tiny, "selected"), tokens, tmp_path / "gradients")
    experts = {name.partition(".mlp.experts.")[2].split(".")[0] for name in ours[1]}
    assert experts == {"", "0", "3", "5"}
    check_against_peft(ours, theirs, tiny, tokens)


def test_peft_refuses_what_it_cannot_say(adapters):
    with pytest.raises(ValueError, match="they are fused into gate_up_proj"):
        peft.PeftModel.from_pretrained(torch_model(), adapters / "selected")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["attention", "modules", "shared-experts", "experts", "all"])
def test_peft_loads_adapters_of_any_targets(tiny, tokens, tmp_path, kind):
    parts, lora = factors_of(tiny, kind)
    save(tmp_path / "a", load_base(tiny[1], jnp.float32), TARGETS[kind])
    theirs = their_gradients(tmp_path / "a", tokens)
    ours = our_gradients(parts, lora, tokens, tmp_path / "g")
    assert ours[1].keys() == theirs[1].keys()
    check_against_peft(ours, theirs, tiny, tokens)


@pytest.mark.slow
def test_rank_and_scale_of_an_adapter_of_peft_are_read(tiny, tokens, tmp_path):
    config = peft.LoraConfig(r=5, lora_alpha=15, target_modules=["q_proj", "o_proj"])
    model = peft.get_peft_model(torch_model(), config)
    with torch.no_grad():
        for name, factor in model.named_parameters():
            if "lora_B" in name:
                factor.normal_(std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    merged = load_model(tiny[1])
    apply_adapter(merged, load_adapter(tmp_path / "theirs"), None)
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits(merged, tokens), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["all", "selected"])
def test_merged_weights_are_base_and_update(tiny, adapters, tmp_path, kind):
    folder = adapters / kind
    base = load_base(tiny[1], jnp.float32)
    before = {path: np.asarray(leaf) for path, leaf in leaves(base.model).items()}
    apply_adapter(base.model, load_adapter(folder), base.fingerprint)
    after = leaves(base.model)
    stored, placements = read(folder), tensor_table(base.model.config).places
    changed = {path for path in after if not np.array_equal(after[path], before[path])}
    names = [name for name in placements if f"base_model.model.{name[:-7]}.lora_A.weight" in stored]
    assert changed == {placements[name].path for name in names}
    assert len(stored) == 2 * len(names)
    for name in names:
        a, b = (stored[f"base_model.model.{name[:-7]}.lora_{side}.weight"] for side in "AB")
        place = placements[name]
        expected = place.from_block(before[place.path][place.box]) + 2.0 * b @ a
        found = place.from_block(np.asarray(after[place.path])[place.box])
        np.testing.assert_allclose(found, expected, atol=1e-6)
    export_model(tiny[1], folder, tmp_path / "exported")
    assert_same(load_model(tmp_path / "exported"), base.model)


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_an_export_keeps_what_the_run_computed_in(tiny, adapters, tmp_path, dtype):
    """Sums in float32 of a base in bfloat16 are rounded, unless the run was in float32."""
    folder = shutil.copytree(adapters / "all", tmp_path / "adapter")
    manifest = json.loads((folder / "manifest.json").read_text())
    half = tmp_path / "half"
    export_model(tiny[1], None, half, "bfloat16")
    manifest |= {"base_fingerprint": load_base(half).fingerprint}
    manifest |= {} if dtype is None else {"dtype": dtype}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    said = []
    export_model(half, folder, tmp_path / "exported", say=said.append)
    files, updates = TensorFiles(tmp_path / "exported"), len(manifest["updates"])
    number = len(files)
    if dtype == "float32":
        line = f"all {number} tensors in float32, {number - updates} cast from bfloat16"
        assert {info.dtype for info in files.values()} == {"F32"}
    else:
        line = f"all {number} tensors in bfloat16, {updates} cast from float32"
        assert {info.dtype for info in files.values()} == {"BF16"}
    assert said == [line]


def test_a_mesh_writes_the_same_adapter(tiny, adapters, tmp_path):
    """Rows lie elsewhere there, and base experts, too."""
    base = load_base(tiny[1], jnp.float32, make_mesh(2, 4))
    save(tmp_path / "again", base, TARGETS["selected"])
    before, again = read(adapters / "selected"), read(tmp_path / "again")
    assert before.keys() == again.keys()
    for name, factor in before.items():
        np.testing.assert_array_equal(again[name], factor, name)


def edit(folder, **keys):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def retensor(folder, change):
    tensors = change(read(folder))
    save_file(tensors, folder / "adapter_model.safetensors")


EXPERT = "base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: edit(f, use_rslora=True), "adapter_config.json: use_rslora: True is not supp"),
        (lambda f: edit(f, rank_pattern={"q": 2}), "rank_pattern: .* is not supported"),
        (
            lambda f: edit(f, init_lora_weights="pissa_niter_4"),
            "init_lora_weights: 'pissa_niter_4' ",
        ),
        (lambda f: edit(f, init_lora_weights="lora_ga"), "init_lora_weights: 'lora_ga' is not sup"),
        (lambda f: edit(f, peft_type="IA3"), "expected a JSON object with peft_type = 'LORA'"),
        (lambda f: edit(f, r=4), r"has shape \[3, 48\]; config.json expects \[4, 48\]"),
        (lambda f: edit(f, r=0), "r: is 0; expected .*greater than 0"),
        (lambda f: edit(f, lora_alpha=None), "lora_alpha: is None; expected a valid number"),
        (lambda f: (f / "manifest.json").write_text("{}"), "'base_fingerprint' is missing"),
        (
            lambda f: retensor(f, lambda t: {n: v for n, v in t.items() if EXPERT not in n}),
            "its tensors are not those of manifest.json",
        ),
        (
            lambda f: retensor(
                f, lambda t: {n: v for n, v in t.items() if n != f"{EXPERT}B.weight"}
            ),
            "gate_proj.lora_B.weight' is missing",
        ),
        (
            lambda f: retensor(f, lambda t: t | {"x.lora_A.weight": t[f"{EXPERT}A.weight"]}),
            "the model has no matrix 'x.weight' to update",
        ),
        (
            lambda f: retensor(f, lambda t: t | {"x.lora_B.weight": t[f"{EXPERT}A.weight"]}),
            "unexpected tensor 'x.lora_B.weight'",
        ),
    ],
)
def test_adapters_that_do_not_fit(tiny, copy, damage, message):
    damage(copy)
    base = load_base(tiny[1], jnp.float32)
    with pytest.raises(InputError, match=message):
        apply_adapter(base.model, load_adapter(copy), base.fingerprint)
    assert_same(base.model, load_model(tiny[1]))


VARIANTS = [field.name for field in fields(peft.LoraConfig) if "is_lora_variant" in field.metadata]


@pytest.mark.parametrize("key", [*VARIANTS, "use_qalora"])
def test_variants_of_peft_are_refused(copy, key):
    edit(copy, **{key: [1]})
    with pytest.raises(InputError, match=rf"{key}: \[1\] is not supported"):
        load_adapter(copy)


@pytest.mark.parametrize("kind", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_factors_may_begin_as_anything_that_leaves_the_base_alone(copy, kind):
    edit(copy, init_lora_weights=kind)
    assert load_adapter(copy).rank == 3


def test_another_base_is_refused(tiny, adapters):
    with pytest.raises(InputError, match="base_fingerprint: trained on another"):
        apply_adapter(load_model(tiny[1]), load_adapter(adapters / "all"), "0" * 64)
