"""Pairs of a transformers model and ours with the same random weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
import transformers
from flax import nnx

from esft_jax.checkpoint.load import load_model
from esft_jax.families import tensor_table
from esft_jax.families.tensors import LeafPath
from esft_jax.model import ModelConfig, Transformer
from tests.checkpoint.checkpoints import save, torch_model

# With 8 rotary features, the ramp of these numbers keeps, blends and interpolates some pair each.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
SHAPE = {
    "num_hidden_layers": 4,
    "n_shared_experts": 2,
    "max_position_embeddings": 163840,
    "rope_parameters": YARN,
}
LITE = SHAPE | {"num_experts_per_tok": 3}
V2 = SHAPE | {
    "q_lora_rank": 12,
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "routed_scaling_factor": 16.0,
    # The norms inside attention keep their own epsilon whatever this is.
    "rms_norm_eps": 1e-3,
    # Different coefficients: cos and sin are scaled, too.
    "rope_parameters": YARN | {"mscale": 1.0},
}


@dataclass(frozen=True)
class Pair:
    """The same weights twice; neither is ever changed."""

    torch: transformers.DeepseekV2ForCausalLM
    jax: Transformer

    @property
    def config(self) -> ModelConfig:
        return self.jax.config

    def torch_layer(self, layer: int) -> Any:
        return self.torch.model.layers[layer]

    def jax_layer(self, layer: int) -> Any:
        """One decoder layer, taken out of its stack."""
        moe, row = self.config.place(layer)
        stack = self.jax.moe_blocks if moe else self.jax.dense_blocks
        graph, params = nnx.split(stack)
        return nnx.merge(graph, jax.tree.map(lambda p: np.asarray(p)[row], params))


def make_pair(folder: Any, **changes: Any) -> Pair:
    """Random weights everywhere, norms and routers included, through a checkpoint on disk."""
    from tests.yardstick import torch

    model = torch_model(**changes)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 1.5)
            elif name.endswith("mlp.gate.weight"):
                weight.normal_(std=0.3)
    return Pair(model, load_model(save(model, folder)))


def stacked(tensors: Mapping[str, Any], config: ModelConfig) -> dict[LeafPath, np.ndarray]:
    """Tensors under transformers' names in memory, as our stacked leaves."""
    slices = tensor_table(config).fused
    parts: dict[LeafPath, list] = {}
    for name, place in tensor_table(config).places.items():
        if name in slices:
            part, whole = slices[name], tuple(slice(0, size) for size in place.shape)
            tensor = part.view(tensors[part.name][part.box(whole)])
        else:
            tensor = tensors[name]
        parts.setdefault(place.path, []).append((place, tensor.detach().numpy()))
    leaves = {}
    for path, found in parts.items():
        ends = [[part.stop for part in place.box] for place, _ in found]
        leaves[path] = np.full(np.max(ends, axis=0), np.nan, np.float32)
        for place, tensor in found:
            leaves[path][place.box] = place.to_block(tensor)
    return leaves


def run(module: Any, *inputs: Any) -> Any:
    """Call a module under jit; its weights are arguments, so equal structures compile once."""
    graph, params = nnx.split(module)
    return jax.tree.map(np.asarray, _call(graph, params, *inputs))


@partial(jax.jit, static_argnums=0)
def _call(graph: nnx.GraphDef, params: nnx.State, *inputs: Any) -> Any:
    return nnx.merge(graph, params)(*inputs)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)
