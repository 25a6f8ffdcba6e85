"""A model released in MXFP4: what is read of it, and what is written once experts were trained."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from esft_jax.adapt.attach import attach_tuned_experts
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import partition
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter, save_adapter, trained_tensors
from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.export import export_model
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.checkpoint.peft import save_lora
from esft_jax.ops.quantisation import Quantisation
from esft_jax.ops.quantised import Quantised
from esft_jax.sharding import make_mesh
from tests.checkpoint.checkpoints import assert_same, leaves, logits, with_factors
from tests.yardstick import torch

RELEASED = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head", "model.embed_tokens"]}
EXPERTS = ExpertConfig({0: (1, 3), 2: (0,)})
LAYER = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A folder with experts in blocks and scales, all else in bfloat16."""
    config = transformers.AutoConfig.for_model(
        "gpt_oss",
        vocab_size=97,
        hidden_size=64,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        max_position_embeddings=64,
        initializer_range=0.2,
        pad_token_id=2,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1 or "bias" in name:
                tensor.normal_(1 if "norm" in name else 0, 0.3)
    folder = tmp_path_factory.mktemp("released") / "model"
    model.to(torch.bfloat16).save_pretrained(folder)
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(0)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = experts, outputs, inputs // 32, 16
        tensors[f"{name}_blocks"] = rng.integers(0, 256, shape, np.uint8)
        tensors[f"{name}_scales"] = rng.integers(122, 126, shape[:-1], np.uint8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text()) | {"quantization_config": RELEASED}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def theirs(folder, tokens):
    """Logits of transformers, which takes bfloat16 weights to float32."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(torch.tensor(tokens)).logits.numpy()


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, 97, (2, 14))


def test_weights_are_those_of_transformers_bit_for_bit(released, tmp_path):
    """As transformers dequantises them; in a file of its own, by the names of bfloat16."""
    model = transformers.AutoModelForCausalLM.from_pretrained(released, dtype=torch.bfloat16)
    model.config.quantization_config = None
    expected = {n: t.contiguous() for n, t in model.state_dict().items()}
    export_model(released, None, tmp_path / "export")
    assert "quantization_config" not in json.loads((tmp_path / "export/config.json").read_text())
    from safetensors.torch import load_file as load_torch

    found = load_torch(tmp_path / "export" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name
    # A conversion, and a mesh whose devices read their own experts alone, hold the same.
    convert_checkpoint(released, tmp_path / "converted")
    one = load_model(released, jnp.bfloat16)
    assert_same(one, load_model(tmp_path / "converted", jnp.bfloat16))
    assert_same(one, load_model(tmp_path / "export", jnp.bfloat16))
    assert_same(one, load_model(released, jnp.bfloat16, make_mesh(2, 4)))
    prints = {load_base(f).fingerprint for f in (released, tmp_path / "export")}
    assert prints == {load_base(tmp_path / "converted").fingerprint}


def test_experts_stay_in_mxfp4(released, tmp_path):
    """What is kept stands for what is published, bit for bit; a conversion keeps the same."""
    how, exact = Quantisation(experts="mxfp4"), leaves(load_model(released, jnp.float32))
    one = leaves(load_base(released, jnp.float32, None, how).model)
    assert sum(isinstance(leaf, Quantised) for leaf in one.values()) == 2
    for path, leaf in one.items():
        values = leaf.astype(jnp.float32) if isinstance(leaf, Quantised) else leaf
        np.testing.assert_array_equal(values, exact[path], str(path))
    convert_checkpoint(released, tmp_path / "converted", quantisations=[how])
    other = leaves(load_base(tmp_path / "converted", jnp.float32, None, how).model)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_trained_adapter_is_merged_into_the_export(released, tokens, tmp_path):
    base = load_base(released, jnp.bfloat16)
    attach_tuned_experts(base.model, EXPERTS)
    graph, tuned, frozen = partition(base.model, EXPERTS)
    rng = np.random.default_rng(2)
    tuned = nnx.map_state(
        lambda _, p: p.replace(p.get_value() + rng.normal(0, 0.1, p.get_value().shape)), tuned
    )
    model = nnx.merge(graph, tuned, frozen)
    manifest = {"base_fingerprint": base.fingerprint, "dtype": "bfloat16"}
    save_adapter(tmp_path / "adapter", trained_tensors(model, tuned), EXPERTS, manifest)
    stored = load_file(tmp_path / "adapter" / "model.safetensors")
    # One by one, by logical names and shapes, whatever the base's files are like.
    assert len(stored) == 3 * 6
    assert stored[f"{LAYER}.3.up_proj.weight"].shape == (32, 64)
    assert stored[f"{LAYER}.3.up_proj.bias"].shape == (32,)
    assert stored[f"{LAYER}.3.down_proj.weight"].shape == (64, 32)
    assert stored[f"{LAYER}.3.down_proj.bias"].shape == (64,)

    export_model(released, tmp_path / "adapter", tmp_path / "export")
    expected = theirs(tmp_path / "export", tokens)
    assert np.abs(expected - theirs(released, tokens)).max() > 0.1
    found = logits(load_model(tmp_path / "export"), tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    wide = load_base(released, jnp.float32)
    apply_adapter(wide.model, load_adapter(tmp_path / "adapter"), wide.fingerprint)
    np.testing.assert_allclose(logits(wide.model, tokens), expected, atol=1e-4)


def test_peft_refuses_updates_of_experts_that_it_would_leave_out(released, tokens, tmp_path):
    peft = pytest.importorskip("peft")
    for targets in (("attention",), ("attention", "experts")):
        base = load_base(released, jnp.float32)
        (graph, tuned, frozen), lora = with_factors(base, targets)
        model = nnx.merge(graph, tuned, frozen)
        manifest = {"base_fingerprint": base.fingerprint, "base_model": str(released)}
        save_lora(tmp_path / targets[-1], model, lora, manifest)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(released, dtype=torch.float32)
        if "experts" in targets:
            with pytest.raises(ValueError, match="not found in the base model"):
                peft.PeftModel.from_pretrained(theirs, tmp_path / targets[-1])
        else:
            both = peft.PeftModel.from_pretrained(theirs, tmp_path / targets[-1])
            with torch.no_grad():
                expected = both(torch.tensor(tokens)).logits.numpy()
            np.testing.assert_allclose(logits(model, tokens), expected, atol=1e-4)


def test_some_layers_may_be_left_in_bfloat16(released, tmp_path):
    export_model(released, None, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    mixed = load_file(released / "model.safetensors")
    for name in ("gate_up_proj", "down_proj"):
        for end in ("blocks", "scales"):
            del mixed[f"{LAYER}.{name}_{end}"]
        mixed[f"{LAYER}.{name}"] = plain[f"{LAYER}.{name}"]
    folder = tmp_path / "mixed"
    folder.mkdir()
    raw = json.loads((released / "config.json").read_text())
    raw["quantization_config"]["modules_to_not_convert"] += [LAYER]
    (folder / "config.json").write_text(json.dumps(raw))
    save_file(mixed, folder / "model.safetensors")
    assert_same(load_model(folder, jnp.bfloat16), load_model(released, jnp.bfloat16))
