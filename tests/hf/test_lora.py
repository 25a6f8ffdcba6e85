"""LoRA beside `peft`: the same gradients and logits, adapters that both read."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx
from safetensors.numpy import load_file, save_file

from esft_jax.errors import InputError
from esft_jax.experts.expert_config import ExpertConfig
from esft_jax.experts.lora import LoRA
from esft_jax.experts.partition import attach, partition
from esft_jax.hf.adapter import apply_adapter, load_adapter
from esft_jax.hf.export import export_model
from esft_jax.hf.load import load_base, load_model
from esft_jax.hf.lora import save_lora
from esft_jax.mesh import make_mesh, param_shardings
from tests.hf.checkpoints import leaves, logits, torch_logits, torch_model

SELECTED = ExpertConfig({1: (5, 0), 2: (3,)})
MODULES = ("attention", "dense_mlps", "shared_experts")
TARGETS = {
    "attention": ("attention",),
    "modules": MODULES,
    "shared-experts": ("shared_experts",),
    "experts": ("experts",),
    "all": (*MODULES, "experts"),
    "selected": ("attention", "selected_experts"),
}
# What `peft` can say for transformers 5, which fuses the experts of a layer.
IN_PEFT = [name for name in TARGETS if name != "selected"]


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


def save(folder, base, targets):
    parts, lora = with_factors(base, targets)
    manifest = {"base_fingerprint": base.fingerprint, "base_model": "base", "step": 7}
    save_lora(folder, nnx.merge(*parts), lora, manifest)
    return parts


def peft_model(tiny, folder, **options):
    return peft.PeftModel.from_pretrained(torch_model(), folder, **options)


@pytest.mark.parametrize("kind", IN_PEFT)
def test_peft_loads_the_adapter_and_agrees(tiny, tokens, tmp_path, kind):
    graph, tuned, frozen = save(tmp_path / "a", load_base(tiny[1], jnp.float32), TARGETS[kind])
    theirs = peft_model(tiny, tmp_path / "a", is_trainable=True)
    found = theirs(torch.tensor(tokens)).logits
    ours = logits(nnx.merge(graph, tuned, frozen), tokens)
    assert np.abs(ours - torch_logits(tiny[0], tokens)).max() > 0.1  # the factors matter
    np.testing.assert_allclose(ours, found.detach().numpy(), atol=1e-4)
