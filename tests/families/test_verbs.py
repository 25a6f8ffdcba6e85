"""What every command does, for families that are no DeepSeek-V2: a run from scores to an export."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from esft_jax import convert, export, generate, report, train
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.export import save_model
from esft_jax.checkpoint.load import load_base, load_model
from esft_jax.families import load_model_config, tensor_table
from esft_jax.model.transformer import Transformer
from tests.checkpoint.checkpoints import assert_same

EMBEDDED = Path(__file__).parents[2] / "models" / "tiny-moe"
SHARED = {
    "vocab_size": 4096,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "dtype": "float32",
}
MODELS = {
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "glm4_moe": {"n_routed_experts": 8, "use_qk_norm": True, "num_nextn_predict_layers": 1},
    "granitemoe": {"num_local_experts": 8, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    # Two kinds of attention; constants; fused files.
    "gemma4_text": {
        "num_experts": 8,
        "top_k_experts": 2,
        "enable_moe_block": True,
        "hidden_size_per_layer_input": 0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "sliding_window": 8,
        "global_head_dim": 20,
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
        "final_logit_softcapping": 10.0,
    },
    "gpt_oss": {
        "num_hidden_layers": 2,  # a layer of each kind
        "num_local_experts": 8,
        "intermediate_size": 24,
        "sliding_window": 7,
    },
}
# Beside a model of vision: its tensors are carried through, as those for multi-token prediction.
MODELS["qwen3_5_moe"] = {
    "text_config": SHARED
    | {
        "num_experts": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "linear_key_head_dim": 10,
        "linear_value_head_dim": 14,
        "shared_expert_intermediate_size": 28,
        "head_dim": 16,
    }
}
MTP = "model.layers.3.mlp.gate.weight"


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """A folder with random weights; that of GLM has a tensor for multi-token prediction, too."""
    template = tmp_path_factory.mktemp("template")
    for path in EMBEDDED.glob("*token*.json"):
        shutil.copy(path, template)
    raw = MODELS[request.param] | {"model_type": request.param}
    raw = raw if "text_config" in raw else SHARED | raw
    (template / "config.json").write_text(json.dumps(raw))
    made = Transformer(load_model_config(template), rngs=nnx.Rngs(0))
    folder = tmp_path_factory.mktemp(request.param) / "model"
    save_model(made, folder, template)
    if request.param == "glm4_moe":
        from safetensors.numpy import save_file

        extra = {MTP: np.ones((8, 40), np.float32)}
        save_file(load_file(folder / "model.safetensors") | extra, folder / "model.safetensors")
    return folder


@pytest.fixture
def config(model, chats, tmp_path):
    content = {
        "model": str(model),
        "output": str(tmp_path / "run"),
        "dtype": "float32",
        "data": {"train": [str(chats)], "valid": [str(chats)], "sequence_length": 32},
        "score": {"samples": 8, "sequence_length": 32, "batch_size": 8},
        "select": {"top_p": 0.3},
        "train": {"steps": 4, "batch_size": 8, "verify_frozen": True},
        "optimizer": {"learning_rate": 1e-2},
        "mesh": {"expert": 4},
    }
    path = tmp_path / "run.json"
    path.write_text(json.dumps(content))
    return path


def test_selected_experts_are_trained_and_exported(config, model, tmp_path, capsys):
    assert train.main(["--config", str(config)]) == 0
    run = tmp_path / "run"
    experts = ExpertConfig.load(run / "expert_cfg.json")
    stored = load_file(run / "adapter" / "model.safetensors")
    table = tensor_table(load_model_config(model))
    of_one = len(table.expert_names(0, 0))
    assert len(stored) == of_one * experts.num_experts_selected
    assert report.main([str(run), "--output", str(tmp_path / "report")]) == 0
    target = tmp_path / "export"
    arguments = ["--base", str(model), "--adapter", str(run / "adapter"), "--to", str(target)]
    assert export.main(arguments) == 0
    before, after = (load_file(f / "model.safetensors") for f in (model, target))
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] != after[name]).any()}
    # Some families' files hold all experts of a layer in a few tensors.
    fused = table.fused if table.experts.stored_fused else {}
    assert changed == {fused[name].name if name in fused else name for name in stored}
    if MTP in before:
        np.testing.assert_array_equal(before[MTP], after[MTP])
    arguments = ["--model", str(target), "--prompt", "What is 2 plus 2?", "--max-new-tokens", "4"]
    capsys.readouterr()
    assert generate.main(arguments) == 0
    merged = capsys.readouterr().out
    arguments[1] = str(model)
    assert generate.main([*arguments, "--adapter", str(run / "adapter")]) == 0
    assert capsys.readouterr().out == merged


@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_other_methods(config, model, tmp_path, method):
    overrides = ["optimizer.learning_rate=0.001", "train.verify_frozen=false"]
    if method == "lora":
        overrides.append("lora.rank=2")
    assert train.main(["--config", str(config), f"method={method}", *overrides]) == 0
    result = tmp_path / "run" / ("adapter" if method == "lora" else "model")
    if method == "full":
        before, after = (load_file(f / "model.safetensors") for f in (model, result))
        kept = {name for name in after if (before[name] == after[name]).all()}
        constant = ("e_score_correction_bias", "layer_scalar")
        assert all(name.endswith(constant) or name == MTP for name in kept)
    else:
        assert load_file(result / "adapter_model.safetensors")


def test_a_converted_checkpoint_holds_the_same(model, tmp_path):
    target = tmp_path / "converted"
    assert convert.main(["--from", str(model), "--to", str(target)]) == 0
    assert_same(load_model(model), load_model(target))
    assert load_base(target).fingerprint == load_base(model).fingerprint
    exported = tmp_path / "exported"
    assert export.main(["--base", str(target), "--to", str(exported)]) == 0
    before, after = (load_file(f / "model.safetensors") for f in (model, exported))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], name)
