"""What was trained here and exported, in vLLM: the same greedy tokens as here and in transformers.

`ESFT_VLLM_PYTHON` names a Python that has vLLM, which does not go together with this project's own
requirements.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import transformers

from esft_jax import export, train
from esft_jax.checkpoint.load import load_model
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.decode.generation import generate_tokens
from tests.yardstick import torch

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("ESFT_VLLM_PYTHON")
# The shortest prompt is one token, the longest more than one block of the engine's cache.
TEXTS = ["", "What is 3 plus 3?", "def main(", "The licence of this program says that it " * 2]
NEW_TOKENS = 40

# vLLM's kernels for CPUs want heads and hidden sizes in multiples of 32; other widths are padded.
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 96,
    "intermediate_size": 112,
    "moe_intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
MODELS = {
    "qwen3_moe": {"num_experts": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "hidden_size": 128, "intermediate_size": 40},
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "use_qk_norm": True,
        "attention_bias": True,
    },
}


@pytest.fixture(params=MODELS)
def base(request, tmp_path):
    """A folder of transformers with random weights everywhere, and the embedded tokenizer."""
    config = transformers.AutoConfig.for_model(request.param, **(SHAPE | MODELS[request.param]))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim == 1 and "inv_freq" not in name:  # norms and biases
                tensor.normal_(1 if "norm" in name else 0, 0.3)
    model.save_pretrained(tmp_path / "base")
    for path in (ROOT / "models" / "tiny-moe").glob("*token*.json"):
        shutil.copy(path, tmp_path / "base")
    return tmp_path / "base"


def tokens_here(folder, prompts):
    model = load_model(folder)
    never = [model.config.vocab_size]  # no token: all completions are of one length
    return generate_tokens(model, prompts, stop_ids=never, max_new_tokens=NEW_TOKENS)


def tokens_in_transformers(folder, prompts):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    length = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    completions = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        done = model.generate(ids, **length, do_sample=False, eos_token_id=None, pad_token_id=2)
        completions.append(done[0, len(prompt) :].tolist())
    return completions


def tokens_in_vllm(folder, prompts, loads, tmp_path):
    """Of the engine started on a folder, then after each load of docs/serving.md's extension."""
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "docs/serving.md").read_text(), re.S)
    (tmp_path / "experts.py").write_text(snippets[0])
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    content = {"prompts": prompts, "new_tokens": NEW_TOKENS, "model": str(folder)}
    content["loads"] = [[str(path) for path in load] for load in loads]
    job.write_text(json.dumps(content))
    # Without the settings of JAX and of this project.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("XLA", "JAX"))}
    settings = {
        "PYTHONPATH": str(tmp_path),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
    }
    command = [PYTHON, ROOT / "tests" / "families" / "vllm_engine.py", job, result]
    done = subprocess.run(
        command, env=kept | settings, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON, reason="needs vLLM: ESFT_VLLM_PYTHON names no Python that has it")
def test_greedy_tokens_are_the_same_in_every_engine(base, chats, tmp_path):
    content = {
        "model": str(base),
        "output": str(tmp_path / "run"),
        "dtype": "float32",
        "data": {"train": [str(chats)], "sequence_length": 32},
        "score": {"samples": 8, "sequence_length": 32, "batch_size": 8},
        "select": {"top_p": 0.3},
        "train": {"steps": 4, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
    }
    (tmp_path / "run.json").write_text(json.dumps(content))
    assert train.main(["--config", str(tmp_path / "run.json")]) == 0
    adapter, exported = tmp_path / "run" / "adapter", tmp_path / "exported"
    arguments = ["--base", base, "--adapter", adapter, "--to", exported]
    assert export.main([str(argument) for argument in arguments]) == 0

    tokenizer = Tokenizer.load(base)
    prompts = [tokenizer.encode_text(text) for text in TEXTS]
    before, after = (tokens_in_transformers(folder, prompts) for folder in (base, exported))
    assert all(old != new for old, new in zip(before, after, strict=True))
    assert tokens_here(base, prompts) == before
    assert tokens_here(exported, prompts) == after

    started, restored, loaded = tokens_in_vllm(
        exported, prompts, [[base], [base, adapter]], tmp_path
    )
    assert started == after
    assert restored == before
    assert loaded == after
