"""What is trained, by roles."""

import jax.numpy as jnp
import pytest
from flax import nnx

from esft_jax.adapt.attach import attach
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.lora import LoRA
from esft_jax.adapt.partition import partition, trained_roles
from esft_jax.adapt.parts import PARTS, roles_of
from esft_jax.errors import InputError
from esft_jax.families import read_model_config
from esft_jax.model import Transformer
from esft_jax.model.params import CONSTANTS, Role

# With every role but a head, selection biases among them.
RAW = {
    "model_type": "glm4_moe",
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "use_qk_norm": True,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}
ROLES = set(Role) - {Role.HEAD, *CONSTANTS}


@pytest.mark.parametrize("part", [part for part in PARTS if part != "head"])
def test_a_part_is_trained_and_nothing_else(part) -> None:
    config = read_model_config(RAW)
    experts = ExpertConfig({}, (part,))

    def tuned() -> nnx.State:
        model = Transformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
        attach(model, experts, seed=0)
        return partition(model, experts)[1]

    params = [param for _, param in nnx.to_flat_state(nnx.eval_shape(tuned))]
    found = {param.role for param in params}
    assert found == roles_of([part]) & ROLES == trained_roles(experts, config)
    assert all(param.get_value().dtype == jnp.float32 for param in params)


def test_what_a_run_trains_by_method() -> None:
    config = read_model_config(RAW)
    assert trained_roles(None, config) == ROLES
    both = ExpertConfig({1: (0,)}, ("router",))
    assert trained_roles(both, config) == {Role.ROUTED_EXPERT, Role.ROUTER}
    lora = LoRA.on(config, 1, 1.0, ("attention", "selected_experts"), ExpertConfig({1: (0,)}))
    assert trained_roles(lora, config) == {Role.ROUTED_EXPERT, Role.ATTENTION}


def test_a_part_that_the_model_does_not_have_is_named() -> None:
    model = Transformer(read_model_config(RAW), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match="also: head: the model has no such parameters"):
        attach(model, ExpertConfig({1: (0,)}, ("head",)), seed=0)
