"""Tiny transformers checkpoints to read, and ways to compare models."""

import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from flax import nnx

from esft_jax.adapt.attach import attach
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.adapt.partition import partition
from esft_jax.sharding import param_shardings

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rope_parameters": YARN,
    "topk_method": "greedy",
    "norm_topk_prob": False,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


def torch_model(seed: int = 0, **changes: Any) -> transformers.DeepseekV2ForCausalLM:
    from tests.yardstick import torch

    torch.manual_seed(seed)
    config = transformers.DeepseekV2Config(**(SHAPE | changes))
    return transformers.DeepseekV2ForCausalLM(config).eval()


def save(model: transformers.DeepseekV2ForCausalLM, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    return folder


def torch_logits(model: transformers.DeepseekV2ForCausalLM, tokens: Any) -> Any:
    from tests.yardstick import torch

    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.float().numpy()


def logits(model, tokens):
    graph, params = nnx.split(model)
    return jax.jit(lambda p, t: nnx.merge(graph, p)(t).logits)(params, tokens)


def leaves(model):
    return {path: param.get_value() for path, param in nnx.to_flat_state(nnx.state(model))}


def assert_same(one, other):
    one, other = leaves(one), leaves(other)
    assert one.keys() == other.keys()
    for path in one:
        np.testing.assert_array_equal(np.asarray(one[path]), np.asarray(other[path]), str(path))


def rewrite(source, target, change):
    """A copy of a one-file checkpoint whose tensors went through `change`."""
    from tests.yardstick import safetensors

    shutil.copytree(source, target)
    tensors = safetensors.load_file(target / "model.safetensors")
    safetensors.save_file(change(tensors), target / "model.safetensors")
    return target


def expert_names(layer: int, expert: int) -> tuple[str, str, str]:
    """Names of an expert's gate, up and down matrices in DeepSeek's models."""
    prefix = f"model.layers.{layer}.mlp.experts.{expert}"
    return f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", f"{prefix}.down_proj.weight"


SELECTED = ExpertConfig({1: (5, 0), 2: (3,)})


def with_factors(base, targets, rank=3):
    """A model with factors of which none is 0, as after training."""
    model = base.model
    lora = LoRA.on(model.config, rank, 2.0 * rank, targets, SELECTED)
    attach(model, lora, seed=1)
    graph, tuned, frozen = partition(model, lora)
    keys = iter(jax.random.split(jax.random.key(2), 100))

    def trained(path, factor):
        if path[-1] == "a":
            return factor
        value = factor.get_value()
        if path[0] == "tuned_experts":
            # As the row's expert says, wherever the row is.
            rows = model.tuned_experts.layout.by_row()
            key, noise = next(keys), []
            for row in rows:
                own = jax.random.fold_in(key, row[0] * 8 + row[1] if row else 0)
                noise.append(jax.random.normal(own, value.shape[1:]))
            return factor.replace(0.1 * jnp.stack(noise))
        return factor.replace(0.1 * jax.random.normal(next(keys), value.shape))

    tuned = nnx.map_state(trained, tuned)
    if model.mesh is not None:
        tuned = jax.tree.map(jax.device_put, tuned, param_shardings(tuned, model.mesh))
    return (graph, tuned, frozen), lora
