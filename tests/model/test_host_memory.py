"""Frozen experts in the memory of the host: the same numbers, and little room on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from esft_jax.adapt.attach import attach
from esft_jax.adapt.lora import LoRA
from esft_jax.adapt.partition import partition
from esft_jax.blocks import read_block, write_blocks
from esft_jax.checkpoint.finite import check_base
from esft_jax.errors import InputError
from esft_jax.host_memory import is_on_host
from esft_jax.model.params import expert_matrices_on_host
from esft_jax.model.quantised import quantise_model
from esft_jax.model.transformer import Transformer
from esft_jax.ops.quantisation import Quantisation
from esft_jax.sharding import make_mesh, param_shardings, place_batch
from tests.model.streamed import STREAMED
from tests.model.test_sharded import CONFIG, EXPERTS
from tests.ops import test_gpu_compile, test_tpu_compile

MATRICES = ("gate_up", "down")
LOW_RANK = LoRA(2, 4.0, ("attention", "selected_experts"), EXPERTS)
# Tokens that each expert gets: of layer 0, all tuned experts would be on the first devices.
LOADS = np.random.default_rng(2).dirichlet(np.ones(8), 3)


def make_base(memory, quantisation=None, mesh=None) -> Transformer:
    def make():
        model = Transformer(CONFIG, rngs=nnx.Rngs(0), mesh=mesh)
        if quantisation is not None:
            quantise_model(model, quantisation, frozenset())
        return model

    graph, params = nnx.split(make())
    places = param_shardings(params, mesh, expert_matrices_on_host(memory))
    return nnx.merge(graph, jax.device_put(params, places))


def experts_of(model):
    return [leaf for name in MATRICES for leaf in jax.tree.leaves(matrices(model, name))]


def matrices(model, name):
    return getattr(model.moe_blocks.moe.experts, name).get_value()


def gradients(model, trained):
    graph, tuned, frozen = partition(model, trained)
    rng = np.random.default_rng(4)
    batch = {"tokens": rng.integers(1, 96, (8, 12)).astype(np.int32)}

    def loss(tuned, frozen, batch):
        return jnp.sin(nnx.merge(graph, tuned, frozen)(batch["tokens"]).logits).sum()

    placed = place_batch(batch, model.mesh)
    return jax.jit(jax.value_and_grad(loss))(tuned, frozen, placed)


CASES = {
    "esft, on a mesh": (EXPERTS, None, "none"),
    "low rank, int4": (LOW_RANK, Quantisation(experts="int4", group_size=16), "full"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_losses_and_gradients_are_the_same(case) -> None:
    trained, quantisation, remat = case
    mesh = None if quantisation else make_mesh(2, 4)
    found = []
    for memory in ("device", "host"):
        model = make_base(memory, quantisation, mesh)
        model.remat = remat
        attach(model, trained, 0, LOADS)
        assert {is_on_host(leaf) for leaf in experts_of(model)} == {memory == "host"}
        found.append(gradients(model, trained))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(found[0]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * largest), *found)


def test_blocks_are_read_and_written_there() -> None:
    model = make_base("host")
    stack, box = matrices(model, "down"), (slice(1, 2), slice(2, 4), slice(3, 9), slice(0, 5))
    before = np.array(stack)
    np.testing.assert_array_equal(read_block(stack, box), before[box])
    written = write_blocks(stack, [(box, np.full((1, 2, 6, 5), 7, np.float32))])
    assert is_on_host(written)
    before[box] = 7
    np.testing.assert_array_equal(np.asarray(written), before)


def test_weights_there_that_are_not_finite_are_found() -> None:
    model = make_base("host")
    check_base(model, "base")
    param = model.moe_blocks.moe.experts.down
    box = (slice(2, 3), slice(5, 6), slice(0, 1), slice(0, 1))
    param.set_value(write_blocks(param.get_value(), [(box, np.full((1, 1, 1, 1), np.nan))]))
    with pytest.raises(InputError, match=r"not finite: model.layers.2.mlp.experts.5.down_proj"):
        check_base(model, "base")


def check_compiled(found, layers: int) -> None:
    """The device is given no stack of experts, and has room for less than so many layers of them
    beside what a step takes with all of them at hand.
    """
    streamed, resident = found
    assert streamed["host"] == streamed["stacks"] and resident["host"] == 0
    spared = resident["arguments"] - streamed["arguments"]
    assert spared == pytest.approx(streamed["stacks"], rel=1e-3)
    assert streamed["temporary"] - resident["temporary"] < layers * streamed["layer"]


@pytest.mark.parametrize("scheme", ["", pytest.param("int4", marks=pytest.mark.slow)])
def test_the_step_of_a_gpu_holds_few_layers_of_experts(scheme) -> None:
    check_compiled(
        [
            test_gpu_compile.compile_for("h100", given(memory, scheme) + STREAMED, "bfloat16")
            for memory in ("host", "device")
        ],
        layers=3,
    )


@pytest.mark.slow
def test_the_step_of_a_tpu_holds_few_layers_of_experts() -> None:
    check_compiled(
        [
            test_tpu_compile.compile_for("v5e", given(memory, "") + STREAMED)
            for memory in ("host", "device")
        ],
        layers=4,
    )


def given(memory, scheme) -> str:
    return f"MEMORY, SCHEME = {memory!r}, {scheme!r}\n"
