"""`config.json`: what cannot be is refused by its key, and what changes nothing is not."""

import pytest

from esft_jax.errors import InputError
from esft_jax.families import read_model_config
from tests.checkpoint.checkpoints import SHAPE, YARN

RAW = SHAPE | {"model_type": "deepseek_v2"}


def yarn(**changes):
    return {"rope_parameters": YARN | changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": True}, "vocab_size: True; expected an integer from 1"),
        (
            {"first_k_dense_replace": None},
            "first_k_dense_replace: None; expected an integer",
        ),
        ({"n_shared_experts": -1}, "n_shared_experts: -1; expected an integer from 0"),
        ({"q_lora_rank": 0}, "q_lora_rank: 0; expected an integer from 1"),
        ({"q_lora_rank": "16"}, "q_lora_rank: '16'; expected an integer"),
        ({"rms_norm_eps": None}, "rms_norm_eps: None; expected a number above 0"),
        ({"routed_scaling_factor": None}, "routed_scaling_factor: None; expected a number"),
        ({"initializer_range": None}, "initializer_range: None; expected a number"),
        ({"rope_parameters": None, "rope_theta": None}, "rope_theta: None; expected a number"),
        (yarn(rope_theta=1), "rope_theta: 1; expected a number above 1"),
        (
            {"rope_parameters": None, "rope_scaling": "yarn"},
            "rope_scaling: 'yarn'; expected an",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.rope_type: 'linear'; exp"),
        (yarn(factor=0), "rope_parameters.factor: 0; expected a number above 0"),
        (yarn(beta_fast="32"), "rope_parameters.beta_fast: '32'; expected a number"),
        (yarn(attention_factor=1.5), "attention_factor: 1.5 is not supported; expected 1.0"),
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method: 'awq' is not supported"),
        (yarn(truncate=False), "truncate: False is not supported; expected True"),
        (yarn(partial_rotary_factor=0.5), "partial_rotary_factor: 0.5 is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5 is not supported"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings: 'false'; expected true or false"),
        ({"norm_topk_prob": 0}, "norm_topk_prob: 0; expected true or false"),
        ({"rope_theta": 5e5}, "rope_parameters.rope_theta: 10000.0 and 500000.0; expected one"),
        (yarn(type="linear"), "rope_parameters.rope_type: 'yarn' and 'linear'; expected one value"),
        (
            {"rope_scaling": {"type": "yarn", **YARN, "factor": 8}},
            "rope_scaling: says something else than rope_parameters",
        ),
    ],
)
def test_senseless_values_are_named(changes, message):
    with pytest.raises(InputError, match=message):
        read_model_config(RAW | changes)


def test_values_without_effect_are_read():
    config = read_model_config(RAW)
    same = yarn(attention_factor=1.0, truncate=True, beta_fast=None, partial_rotary_factor=1)
    assert read_model_config(RAW | same) == config
    assert read_model_config(RAW | {"partial_rotary_factor": None}) == config
    assert read_model_config(RAW | {"n_shared_experts": None}).shared_width == 0


def test_the_fingerprint_is_of_what_a_model_computes():
    config = read_model_config(RAW)
    old = {key: value for key, value in YARN.items() if key not in ("rope_type", "rope_theta")}
    spelled = {"rope_parameters": None, "rope_scaling": old | {"type": "yarn"}, "rope_theta": 1e4}
    for same in (
        spelled,
        {"rope_scaling": YARN | {"type": "yarn"}},
        {"initializer_range": 0.5, "max_position_embeddings": 8192, "torch_dtype": "float16"},
    ):
        assert read_model_config(RAW | same).fingerprint == config.fingerprint
    for other in (
        {"rms_norm_eps": 1e-5},
        {"norm_topk_prob": True},
        {"num_experts_per_tok": 3},
        yarn(rope_theta=10001.0),
        yarn(mscale=0.5),
    ):
        assert read_model_config(RAW | other).fingerprint != config.fingerprint
