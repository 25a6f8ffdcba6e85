"""Checkpoints in fp8 with a scale per block, on every way into the product and out of it."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.export import export_model, save_model
from esft_jax.checkpoint.fp8 import Fp8Files
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.checkpoint.quantise import quantise_converted
from esft_jax.checkpoint.source import HuggingFaceSource
from esft_jax.errors import InputError
from esft_jax.families import load_model_config, read_model_config
from esft_jax.model.params import Role
from esft_jax.model.transformer import Transformer
from esft_jax.ops.quantisation import Quantisation
from esft_jax.ops.quantised import Quantised
from esft_jax.sharding import make_mesh
from tests.checkpoint.checkpoints import assert_same, leaves, logits

FP8 = ml_dtypes.float8_e4m3fn
BLOCK = 16, 8
QUANTISED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
}
# Few sides are a multiple of the block's.
SHAPE = {
    "model_type": "deepseek_v3",
    "vocab_size": 48,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 20,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "kv_lora_rank": 12,
    "q_lora_rank": None,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
    "quantization_config": QUANTISED,
}
EXPERT = "model.layers.1.mlp.experts.3.gate_proj.weight"
OUT = "model.layers.1.self_attn.o_proj.weight"
LAYER = "model.layers.1.mlp.experts"
MTP = "model.layers.2.mlp.experts.0.up_proj.weight"
SCALES = "_scale_inv"


def quantise(tensors, seed=0):
    """Tensors with all matrices of linear layers in fp8, as DeepSeek-V3 is released."""
    random, found = np.random.default_rng(seed), {}
    for name, tensor in tensors.items():
        kept = any(part in name for part in ("embed", "lm_head", "mlp.gate."))
        if tensor.ndim < 2 or kept:
            found[name] = tensor
            continue
        blocks = [-(-size // step) for size, step in zip(tensor.shape, BLOCK, strict=True)]
        scale = random.uniform(1e-3, 3e-3, blocks).astype(np.float32)
        found[name] = (tensor / grid(scale, tensor.shape)).astype(FP8)
        found[name + SCALES] = scale
    return found


def grid(scale, shape, block=BLOCK):
    """The scale of every element."""
    return np.kron(scale, np.ones(block))[: shape[0], : shape[1]]


def reference(tensors):
    """What fp8 tensors stand for: products in float64, which are exact, rounded once."""
    return {
        name: (
            (tensor.astype(np.float64) * grid(tensors[name + SCALES], tensor.shape))
            if name + SCALES in tensors
            else tensor
        ).astype(np.float32)
        for name, tensor in tensors.items()
        if not name.endswith(SCALES)
    }


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """Tensors of a model in fp8, one of a layer for multi-token prediction among them."""
    template = tmp_path_factory.mktemp("template")
    raw = {key: value for key, value in SHAPE.items() if key != "quantization_config"}
    (template / "config.json").write_text(json.dumps(raw))
    made = template / "made"
    save_model(Transformer(load_model_config(template), rngs=nnx.Rngs(0)), made, template)
    extra = {MTP: np.random.default_rng(1).normal(0, 0.1, (20, 40)).astype(np.float32)}
    found = quantise(load_file(made / "model.safetensors") | extra)
    assert found[EXPERT].shape == (20, 40)
    assert found[EXPERT + SCALES].shape == (2, 5)
    return found


def write(folder, tensors, raw=SHAPE):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folder(stored, tmp_path_factory):
    return write(tmp_path_factory.mktemp("fp8") / "model", stored)


@pytest.fixture(scope="module")
def plain(stored, tmp_path_factory):
    """The same weights in float32, by the reference."""
    raw = {key: value for key, value in SHAPE.items() if key != "quantization_config"}
    return write(tmp_path_factory.mktemp("plain") / "model", reference(stored), raw)


def test_it_loads_as_what_its_values_stand_for(folder, plain, monkeypatch):
    assert_same(load_model(folder, jnp.bfloat16), load_model(plain, jnp.bfloat16))
    shapes, read = [], Fp8Files.read

    def spy(self, name, index=()):
        found = read(self, name, index)
        shapes.append((name, found.shape))
        return found

    monkeypatch.setattr(Fp8Files, "read", spy)
    assert_same(load_model(folder, mesh=make_mesh(2, 4)), load_model(plain))
    parts = [shape for name, shape in shapes if name == OUT]
    assert len(parts) > 1  # every device has its own slice, with the scales of that
    assert sum(np.prod(shape) for shape in parts) == 40 * 20


@pytest.mark.parametrize("rows", [(0, 20), (3, 4), (15, 17), (16, 20)])
@pytest.mark.parametrize("columns", [(0, 40), (7, 9), (8, 16), (39, 40)])
def test_any_slice_is_that_of_the_whole(folder, stored, rows, columns):
    index = slice(*rows), slice(*columns)
    found = HuggingFaceSource(folder).tensor(EXPERT, index)
    np.testing.assert_array_equal(found, reference(stored)[EXPERT][index])


def test_a_conversion_loses_nothing(folder, plain, tmp_path):
    target = tmp_path / "converted"
    fingerprint = convert_checkpoint(folder, target)
    assert fingerprint == HuggingFaceSource(folder).fingerprint
    assert fingerprint == HuggingFaceSource(plain).fingerprint
    assert_same(load_model(target), load_model(plain))
    export_model(folder, None, tmp_path / "one", say=lambda line: None)
    export_model(target, None, tmp_path / "other", say=lambda line: None)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_an_export_is_in_bfloat16_and_says_so(folder, stored, tmp_path):
    lines = []
    export_model(folder, None, tmp_path / "export", say=lines.append)
    assert lines[0].startswith("all ")
    assert "in bfloat16" in lines[0]
    assert "dequantised from fp8, without quantization_config" in lines[0]
    found, expected = load_file(tmp_path / "export" / "model.safetensors"), reference(stored)
    assert found.keys() == expected.keys()  # and no scales
    for name, tensor in expected.items():
        kind = np.float32 if "e_score_correction_bias" in name else jnp.bfloat16
        np.testing.assert_array_equal(found[name], tensor.astype(kind), name)
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())
    export_model(tmp_path / "export", None, tmp_path / "again", say=lines.append)
    one, other = (tmp_path / name / "model.safetensors" for name in ("export", "again"))
    assert one.read_bytes() == other.read_bytes()


def test_experts_of_a_layer_in_one_tensor(folder, stored, tmp_path):
    """Scales of fused tensors have the experts in front, as the values have."""
    layer = "model.layers.1.mlp.experts"
    values = reference(stored)
    fused = {
        f"{layer}.gate_up_proj": np.stack(
            [
                np.concatenate(
                    [values[f"{layer}.{e}.{part}_proj.weight"] for part in ("gate", "up")]
                )
                for e in range(8)
            ]
        )
    }
    for end in ("", SCALES):
        down = [stored[f"{layer}.{expert}.down_proj.weight{end}"] for expert in range(8)]
        fused[f"{layer}.down_proj{end}"] = np.stack(down)
    others = {name: tensor for name, tensor in stored.items() if not name.startswith(layer)}
    other = write(tmp_path / "fused", others | fused)
    assert HuggingFaceSource(other).fingerprint == HuggingFaceSource(folder).fingerprint


KEPT = Quantisation(experts="fp8", rest="fp8")


def assert_kept(kept, exact):
    """Matrices are quantised, and stand for the same numbers bit for bit; all else is the same."""
    kept, exact = leaves(kept), leaves(exact)
    assert kept.keys() == exact.keys()
    for path, leaf in kept.items():
        if isinstance(leaf, Quantised):
            assert leaf.scheme == "fp8" and leaf.codes.dtype == np.uint8
            leaf = leaf.astype(jnp.float32)
        np.testing.assert_array_equal(leaf, exact[path], str(path))
    return {path[-1] for path, leaf in kept.items() if isinstance(leaf, Quantised)}


def test_fp8_that_is_kept_is_what_is_published(folder, plain):
    exact = load_model(plain)
    found = assert_kept(load_base(folder, jnp.float32, None, KEPT).model, exact)
    assert found == {"gate_up", "down", "q", "kv_down", "kv_up", "out"}
    assert_kept(load_base(folder, jnp.float32, make_mesh(2, 4), KEPT).model, exact)
    some = Quantisation(experts="fp8", rest="int8", group_size=16)
    model = load_base(folder, jnp.float32, None, some, frozenset({Role.ATTENTION})).model
    assert model.moe_blocks.moe.experts.down.get_value().scheme == "fp8"
    assert model.moe_blocks.moe.shared_experts.down.get_value().scheme == "int8"
    assert not isinstance(model.moe_blocks.attentions[0].out.get_value(), Quantised)


def test_logits_beside_fp8_that_is_kept(folder, plain):
    tokens = np.random.default_rng(0).integers(0, 48, (2, 9))
    found = logits(load_base(folder, jnp.float32, None, KEPT).model, tokens)
    np.testing.assert_allclose(found, logits(load_model(plain), tokens), atol=1e-5)


def test_a_conversion_keeps_fp8(folder, stored, plain, tmp_path):
    target = tmp_path / "converted"
    convert_checkpoint(folder, target)
    with pytest.raises(
        InputError, match=r"converted: does not keep \S+ in fp8; expected the folder"
    ):
        load_base(target, jnp.float32, None, KEPT)
    with pytest.raises(InputError, match=r"does not keep .* `convert --from ... --quantise`"):
        quantise_converted(target, KEPT)
    # The same scales, but one number is another.
    one = stored[EXPERT].copy()
    one.view(np.uint8)[3, 5] ^= 1
    other = write(tmp_path / "other", stored | {EXPERT: one})
    with pytest.raises(InputError, match=r"experts.gate_up has other numbers than the source"):
        convert_checkpoint(other, target, str(folder), [KEPT])
    convert_checkpoint(folder, target, quantisations=[KEPT])
    found, expected = (load_base(f, jnp.float32, None, KEPT).model for f in (target, folder))
    assert_kept(found, load_model(plain))
    found, expected = (jax.tree.leaves(nnx.state(model)) for model in (found, expected))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    quantise_converted(target, KEPT)  # all of it is there


def fused_in_fp8(values, random, block=BLOCK):
    """A fused tensor in fp8, its scales, and what both stand for."""
    shape = values.shape[1:]
    blocks = [-(-size // step) for size, step in zip(shape, block, strict=True)]
    scales = random.uniform(1e-3, 3e-3, (len(values), *blocks)).astype(np.float32)
    wide = np.stack([grid(scale, shape, block) for scale in scales])
    codes = (values / wide).astype(FP8)
    return codes, scales, (codes.astype(np.float64) * wide).astype(np.float32)


def test_fused_experts_are_kept(stored, tmp_path):
    layer, random, values = LAYER, np.random.default_rng(3), reference(stored)
    experts = {
        part: np.stack([values[f"{layer}.{e}.{part}_proj.weight"] for e in range(8)])
        for part in ("gate", "up", "down")
    }
    gate_up = np.concatenate([experts["gate"], experts["up"]], axis=1)
    tensors = {name: t for name, t in stored.items() if not name.startswith(layer)}
    for name, fused in ("gate_up_proj", gate_up), ("down_proj", experts["down"]):
        codes, scales, _ = fused_in_fp8(fused, random)
        tensors[f"{layer}.{name}"], tensors[f"{layer}.{name}{SCALES}"] = codes, scales
    other = write(tmp_path / "fused", tensors)
    # Blocks of a fused tensor reach from gate into up.
    assert_kept(load_base(other, jnp.float32, None, KEPT).model, load_model(other))


INPUTS_FIRST = {
    "model_type": "gpt_oss",
    "vocab_size": 41,
    "hidden_size": 40,
    "intermediate_size": 22,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 12,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "initializer_range": 0.1,
}


@pytest.mark.parametrize("block", [(8, 8), BLOCK], ids=["square", "oblong"])
def test_fused_experts_with_inputs_first_and_gate_and_up_in_turns(tmp_path, block):
    template, made, random = tmp_path / "template", tmp_path / "made", np.random.default_rng(4)
    template.mkdir()
    (template / "config.json").write_text(json.dumps(INPUTS_FIRST))
    save_model(Transformer(load_model_config(template), rngs=nnx.Rngs(0)), made, template)
    tensors = load_file(made / "model.safetensors")
    exact = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
        found = fused_in_fp8(tensors[name], random, block)
        tensors[name], tensors[name + SCALES], exact[name] = found
    raw = INPUTS_FIRST | {"quantization_config": QUANTISED | {"weight_block_size": list(block)}}
    folder = write(tmp_path / "fp8", tensors, raw)
    plain = load_model(write(tmp_path / "plain", exact, INPUTS_FIRST))
    assert_same(load_model(folder), plain)
    if block == BLOCK:
        with pytest.raises(InputError, match=r"inputs first and blocks of \(16, 8\); expected squ"):
            load_base(folder, jnp.float32, None, Quantisation(experts="fp8"))
    else:
        assert_kept(load_base(folder, jnp.float32, None, Quantisation(experts="fp8")).model, plain)


def test_what_is_not_in_fp8_cannot_be_kept_so(plain, stored, tmp_path):
    for key in ("experts", "rest"):
        with pytest.raises(InputError, match=f"quantise.{key}: fp8 keeps what .* not in blocks"):
            load_base(plain, jnp.float32, None, Quantisation(**{key: "fp8"}))
    values = reference(stored)[OUT]
    part = {name: t for name, t in stored.items() if name != OUT + SCALES} | {OUT: values}
    some = write(tmp_path / "some", part)
    with pytest.raises(InputError, match=f"quantise.rest: fp8 keeps .*'{OUT}' of .* is F32"):
        load_base(some, jnp.float32, None, KEPT)
    load_base(some, jnp.float32, None, Quantisation(experts="fp8"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t | {EXPERT + SCALES: t[EXPERT + SCALES] * np.nan},
            f"{EXPERT}{SCALES}' has val",
        ),
        (lambda t: t | {EXPERT: (t[EXPERT].view(np.uint8) | 0x7F).view(FP8)}, f"{EXPERT}' has val"),
    ],
)
def test_codes_and_scales_that_are_kept_are_numbers(stored, tmp_path, change, message):
    bad = write(tmp_path / "bad", change(stored))
    with pytest.raises(InputError, match=message):
        load_base(bad, jnp.float32, None, KEPT)


def changed(name, make):
    return lambda tensors: tensors | {name: make(tensors[name])}


def without(name):
    return lambda tensors: {other: t for other, t in tensors.items() if other != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (reference, "config.json: quantization_config: says fp8, which no tensor is in"),
        (without(EXPERT + SCALES), f"tensor '{EXPERT}' is in F8_E4M3; its scales, .*, miss"),
        (without(EXPERT), f"'{EXPERT}{SCALES}': expected '{EXPERT}' in F8_E4M3; it is no tensor"),
        (changed(EXPERT, lambda t: t.astype(np.float16)), "in F8_E4M3; it is F16"),
        (changed(EXPERT + SCALES, lambda s: s[:1]), r"has shape \[1, 5\]; expected \[2, 5\]"),
        (changed(EXPERT + SCALES, lambda s: s.T.copy()), r"has shape \[5, 2\]; expected \[2, 5\]"),
        (changed(EXPERT + SCALES, lambda s: s.astype(np.uint8)), "has type U8; expected BF16"),
        (
            changed(EXPERT + SCALES, lambda s: s * np.nan),
            f"{EXPERT}{SCALES}' has values that are not",
        ),
        (changed(EXPERT + SCALES, lambda s: s / 0), f"{EXPERT}{SCALES}' has values that are not"),
        (changed(EXPERT, lambda t: (t.view(np.uint8) | 0x7F).view(FP8)), f"not finite: {EXPERT}"),
        (changed(EXPERT, lambda t: t.astype(ml_dtypes.float8_e5m2)), "it is F8_E5M2"),
        (changed("model.norm.weight", lambda t: t.astype(FP8)), "model.norm.weight' is in F8_E4M3"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_scales_that_do_not_fit_are_named(stored, tmp_path, change, message):
    bad = write(tmp_path / "bad", change(stored))
    with pytest.raises(InputError, match=message):
        load_model(bad)


def test_fp8_needs_its_key(stored, tmp_path):
    bad = write(tmp_path / "bad", stored, SHAPE | {"quantization_config": None})
    with pytest.raises(InputError, match="type F8_E4M3; expected .* as quantization_config of"):
        load_model(bad)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, ml_dtypes.float8_e8m0fnu])
def test_scales_of_other_types(stored, tmp_path, dtype):
    rounded = {n: t.astype(dtype) if n.endswith(SCALES) else t for n, t in stored.items()}
    folder = write(tmp_path / "other", rounded)
    wide = {n: t.astype(np.float32) if n.endswith(SCALES) else t for n, t in rounded.items()}
    np.testing.assert_array_equal(HuggingFaceSource(folder).tensor(EXPERT), reference(wide)[EXPERT])


RELEASED = {
    "quant_method": "fp8",
    "fmt": "float8_e4m3fn",
    "scale_fmt": "ue8m0",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
}


def test_spellings_of_releases():
    assert read_model_config(SHAPE | {"quantization_config": RELEASED}).fp8_block == (128, 128)
    assert read_model_config(SHAPE | {"quantization_config": None}).fp8_block is None
    one = read_model_config(SHAPE)
    other = read_model_config(SHAPE | {"quantization_config": None})
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, "quantization_config.quant_method: 'gptq' is not supported"),
        ({"quant_method": "compressed-tensors"}, "quant_method: 'compressed-tensors' is not"),
        ({"quant_method": None}, "quant_method: None is not supported; expected 'fp8'"),
        ({"activation_scheme": "static"}, "activation_scheme: 'static' is not supported"),
        ({"fmt": "e5m2"}, "fmt: 'e5m2' is not supported"),
        ({"weight_block_size": None}, "weight_block_size: None is not supported"),
        ({"weight_block_size": [128]}, r"weight_block_size: \[128\] is not supported"),
        ({"weight_block_size": [0, 128]}, "weight_block_size"),
        ({"weight_block_size": [True, 128]}, "weight_block_size"),
        ({"expert_dtype": "fp4"}, "expert_dtype: 'fp4' is not supported"),
        ({"bits": 4}, "quantization_config.bits: 4 is not supported"),
    ],
)
def test_other_quantisations_are_refused_by_key(change, message):
    with pytest.raises(InputError, match=message):
        read_model_config(SHAPE | {"quantization_config": RELEASED | change})


@pytest.mark.parametrize("value", ["fp8", [], {}])
def test_no_object_or_an_empty_one(value):
    with pytest.raises(InputError, match="quantization_config"):
        read_model_config(SHAPE | {"quantization_config": value})
