"""What was trained here, in vLLM, exported or put into a running engine: the same greedy tokens as
here and in transformers.

`ESFT_VLLM_PYTHON` names a Python that has vLLM, which does not go together with this project's own
requirements.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import lazy_loader
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

slow = pytest.mark.slow
no_vllm = pytest.mark.skipif(
    not PYTHON, reason="needs vLLM: ESFT_VLLM_PYTHON names no Python that has it"
)


def needs_vllm(test):
    """Minutes for each engine that starts."""
    return slow(no_vllm(test))


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


@pytest.fixture
def environment(tmp_path):
    """Of vLLM's Python: this package, and none of the settings of JAX."""
    shutil.copytree(Path(lazy_loader.__file__).parent, tmp_path / "path" / "lazy_loader")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("XLA", "JAX"))}
    return kept | {
        "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'path'}",
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_SERVER_DEV_MODE": "1",
    }


def tokens_in_vllm(folder, prompts, adapters, environment, tmp_path):
    """Of the engine started on a folder, then after each exchange of adapters."""
    job, result = tmp_path / "job.json", tmp_path / "result.json"
    content = {"prompts": prompts, "new_tokens": NEW_TOKENS, "model": str(folder)}
    content["adapters"] = [adapter and str(adapter) for adapter in adapters]
    job.write_text(json.dumps(content))
    command = [PYTHON, ROOT / "tests" / "families" / "vllm_engine.py", job, result]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def make_adapter(base, chats, folder, top_p):
    content = {
        "model": str(base),
        "output": str(folder),
        "dtype": "float32",
        "data": {"train": [str(chats)], "sequence_length": 32},
        "score": {"samples": 8, "sequence_length": 32, "batch_size": 8},
        "select": {"top_p": top_p},
        "train": {"steps": 4, "batch_size": 8},
        "optimizer": {"learning_rate": 1e-2},
    }
    folder.with_suffix(".json").write_text(json.dumps(content))
    assert train.main(["--config", str(folder.with_suffix(".json"))]) == 0
    arguments = ["--base", base, "--adapter", folder / "adapter", "--to", folder / "exported"]
    assert export.main([str(argument) for argument in arguments]) == 0
    return folder / "adapter", folder / "exported"


@needs_vllm
def test_greedy_tokens_are_the_same_in_every_engine(base, chats, environment, tmp_path):
    one, exported = make_adapter(base, chats, tmp_path / "one", 0.3)
    other, exported_other = make_adapter(base, chats, tmp_path / "other", 0.6)
    tokenizer = Tokenizer.load(base)
    prompts = [tokenizer.encode_text(text) for text in TEXTS]
    folders = base, exported, exported_other
    before, after, after_other = (tokens_in_transformers(folder, prompts) for folder in folders)
    assert before != after != after_other != before
    assert [tokens_here(folder, prompts) for folder in folders] == [before, after, after_other]

    adapters = [one, other, None, other]
    found = tokens_in_vllm(base, prompts, adapters, environment, tmp_path)
    assert found == [before, after, after_other, before, after_other]
    assert tokens_in_vllm(exported, prompts, [], environment, tmp_path) == [after]


@needs_vllm
@pytest.mark.parametrize("base", ["qwen3_moe"], indirect=True)
def test_adapters_are_exchanged_in_a_running_server(base, chats, environment, tmp_path):
    adapter, exported = make_adapter(base, chats, tmp_path / "one", 0.3)
    tokenizer = Tokenizer.load(base)
    prompts = [tokenizer.encode_text(text) for text in TEXTS]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    command += ["--worker-extension-cls", "esft_jax.serving.vllm.ExpertAdapters"]
    command += ["--dtype", "float32", "--enforce-eager", "--host", "127.0.0.1", "--port", port]

    def post(path, **content):
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/{path}",
            json.dumps(content).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.loads(answer.read() or "null")

    def complete():
        options = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True}
        answers = [
            post("v1/completions", prompt=ids, return_token_ids=True, **options) for ids in prompts
        ]
        return [answer["choices"][0]["token_ids"] for answer in answers]

    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, env=environment, cwd=tmp_path, stdout=log, stderr=log)
    try:
        begin, ready = time.monotonic(), False
        while not ready:
            said = (tmp_path / "server.log").read_text()[-3000:]
            assert server.poll() is None and time.monotonic() - begin < 3600, said
            time.sleep(1)
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                ready = True
        found = [complete()]
        post("collective_rpc", method="load_esft_adapter", args=[str(adapter)])
        assert post("reset_prefix_cache") == {"success": True}
        found.append(complete())
        post("collective_rpc", method="unload_esft_adapter")
        assert post("reset_prefix_cache") == {"success": True}
        found.append(complete())
    finally:
        server.terminate()
        server.wait(600)
    before, after = (tokens_here(folder, prompts) for folder in (base, exported))
    assert found == [before, after, before] != [before] * 3
