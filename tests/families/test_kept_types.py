"""Parameters that stay float32: as Qwen3.5's files have two of each layer beside bfloat16, and as
Qwen3.6's have none.
"""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from safetensors.numpy import load_file, save_file

from esft_jax.checkpoint.convert import convert_checkpoint
from esft_jax.checkpoint.export import export_model, save_model
from esft_jax.checkpoint.load import load_model
from esft_jax.families import load_model_config
from esft_jax.model.transformer import Transformer
from tests.families.test_verbs import EMBEDDED, MODELS

VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 12,
    "num_heads": 2,
    "num_position_embeddings": 4,
}
WIDE = r"linear_attn\.(A_log|norm\.weight)$"


@pytest.fixture(scope="module", params=["qwen3.5", "qwen3.6"])
def base(request, tmp_path_factory):
    """In bfloat16, with and without float32 beside it; a tensor of vision, one of prediction."""
    template = tmp_path_factory.mktemp("template")
    for path in EMBEDDED.glob("*token*.json"):
        shutil.copy(path, template)
    raw = {"model_type": "qwen3_5_moe", **MODELS["qwen3_5_moe"], "vision_config": VISION}
    (template / "config.json").write_text(json.dumps(raw | {"dtype": "bfloat16"}))
    made = Transformer(load_model_config(template), rngs=nnx.Rngs(0))
    noise = np.random.default_rng(0)
    for path, param in nnx.to_flat_state(nnx.state(made, nnx.Param)):
        if path[-1] in ("log_rate", "scale"):
            value = param.get_value()
            param.set_value(value + jnp.float32(0.3 * noise.normal(size=value.shape)))
    folder = tmp_path_factory.mktemp("base") / "model"
    save_model(made, folder, template)
    tensors = {
        name: tensor
        if request.param == "qwen3.5" and re.search(WIDE, name)
        else tensor.astype(jnp.bfloat16)
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    tensors |= {
        "model.visual.pos_embed.weight": np.ones((4, 16), np.float32),
        "mtp.fc.weight": np.ones((3, 2), jnp.bfloat16),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_what_is_float32_stays_so_in_memory(base):
    model = load_model(base, jnp.bfloat16)
    stored = load_file(base / "model.safetensors")
    for name, leaf in (("A_log", "log_rate"), ("norm.weight", "norm")):
        param = getattr(model.moe_blocks.attention, leaf)
        value = (param.scale if leaf == "norm" else param).get_value()
        assert value.dtype == jnp.float32
        wanted = stored[f"model.language_model.layers.2.linear_attn.{name}"]
        np.testing.assert_array_equal(value[1], wanted)  # of the second layer of its kind
    assert model.moe_blocks.attention.step_offset.get_value().dtype == jnp.bfloat16


@pytest.mark.parametrize("converted", [False, True])
def test_exports_keep_every_type(base, tmp_path, converted):
    source = base
    if converted:
        source = tmp_path / "converted"
        convert_checkpoint(base, source)
    export_model(source, None, tmp_path / "export")
    expected = load_file(base / "model.safetensors")
    found = load_file(tmp_path / "export" / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        np.testing.assert_array_equal(found[name], tensor, name)


def test_transformers_loads_an_export_whole_and_the_text_alone(base, tmp_path):
    from tests.yardstick import torch

    export_model(base, None, tmp_path / "export", jnp.float32)
    tokens = np.random.default_rng(1).integers(0, 4096, (2, 20))
    ours = load_model(tmp_path / "export")(tokens).logits
    for auto in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        theirs = auto.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
        with torch.no_grad():
            wanted = theirs(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(ours, wanted, atol=1e-4)
        assert len(theirs.get_decoder().layers) == 3
