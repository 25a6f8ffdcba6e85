"""Runs whose frozen experts are in the memory of the host."""

import dataclasses
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from esft_jax.config import QuantiseConfig, RunConfig
from esft_jax.errors import InputError
from esft_jax.evaluation.load import load_tuned
from esft_jax.families import load_model_config
from esft_jax.host_memory import is_on_host
from esft_jax.planning.analysis import open_case
from esft_jax.planning.program import local_bytes
from esft_jax.training.fit import check_fit
from esft_jax.training.loop import run_training
from esft_jax.training.setup import open_setup
from tests.training.test_quantised_run import loss_on, quantisation

HOW = {"experts": "int4", "group_size": 16}


def run(config: RunConfig):
    return run_training(open_setup(config), say=lambda text: None)


def test_a_run_and_its_adapter(make_config) -> None:
    config = make_config(quantise=HOW, select={"top_p": 0.3})
    train = dataclasses.replace(config.train, verify_frozen=True)
    config = dataclasses.replace(config, train=train)
    there = dataclasses.replace(config, frozen_memory="host", output=f"{config.output}-host")
    expected, found = run(config), run(there)
    assert (found.experts, found.total) == (expected.experts, expected.total)
    assert found.valid_loss == pytest.approx(expected.valid_loss, rel=1e-6)

    how = quantisation(rest=None)
    beside = load_tuned(config.model, found.result, np.float32, None, how, frozen_memory="host")
    stack = beside.model.moe_blocks.moe.experts.down.get_value()
    assert is_on_host(stack.codes) and is_on_host(stack.scales)
    assert loss_on(beside.model, config) == pytest.approx(found.valid_loss, rel=1e-5)


def test_an_adapter_is_merged_into_experts_there(make_config) -> None:
    config = make_config(select={"top_p": 0.3})
    result = run(config).result
    merged = [
        load_tuned(config.model, result, np.float32, None, frozen_memory=memory).model
        for memory in ("device", "host")
    ]
    stacks = [model.moe_blocks.moe.experts.gate_up.get_value() for model in merged]
    assert list(map(is_on_host, stacks)) == [False, True]
    np.testing.assert_array_equal(*map(np.asarray, stacks))


def test_what_a_plan_counts(make_config) -> None:
    config = make_config(mesh={"data": 1}, train={"batch_size": 1})
    given = [
        open_case(dataclasses.replace(config, frozen_memory=m), "cpu:1", experts_per_layer=2)
        for m in ("device", "host")
    ]
    there, streamed = (case.shapes().frozen for case in given)
    model = given[0].model
    numbers = 3 * model.hidden_size * model.expert_width * model.router.num_experts
    experts = 4 * numbers * len(model.moe_layers)
    assert (local_bytes(there, "host"), local_bytes(streamed, "host")) == (0, experts)
    assert local_bytes(streamed) == local_bytes(there) - experts


def test_refusals(make_config) -> None:
    with pytest.raises(ValueError, match="frozen_memory: method full freezes nothing"):
        make_config(method="full", frozen_memory="host")


def test_codes_are_not_taken_from_the_host_of_a_tpu(make_config) -> None:
    config = make_config(quantise={"experts": "int8"}, frozen_memory="host")
    model = load_model_config(config.model)

    def check(platform: str, config: RunConfig) -> None:
        device = SimpleNamespace(platform=platform)
        check_fit(model, MagicMock(devices=np.array([device]), size=1, shape={"expert": 1}), config)

    with pytest.raises(InputError, match="frozen_memory: XLA for TPUs copies all int8 experts"):
        check("tpu", config)
    check("gpu", config)
    check("tpu", dataclasses.replace(config, quantise=QuantiseConfig(rest="int8")))
