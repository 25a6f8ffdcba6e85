"""The benchmark that compiles for TPU slices: what it counts, and a case from end to end."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from esft_jax.experts.expert_config import ExpertConfig
from esft_jax.mesh import EXPERT, make_mesh
from esft_jax.model.config import ModelConfig
from esft_jax.ops.attention import causal_attention

EXPERTS = {1: (0, 7), 3: (2,)}


@pytest.fixture
def benchmark(script):
    return script("tpu_compile")


def test_loops_and_shares_of_devices_are_counted(benchmark):
    mesh = make_mesh(data=1, expert=8)

    def step(x, w):
        def layer(x, w):
            return x @ w, None

        x, _ = jax.lax.scan(layer, x, w)  # 3 products of all devices together
        local = PartitionSpec(EXPERT)
        return jax.shard_map(lambda x: x @ x.T, mesh=mesh, in_specs=local, out_specs=local)(x)

    traced = jax.jit(step).trace(jnp.ones((16, 4)), jnp.ones((3, 4, 4)))
    work = benchmark.count_work(traced.jaxpr.jaxpr, benchmark.Routing(np.array([1]), 0), 8)
    one, local = 2 * 16 * 4 * 4 / 8, 2 * 2 * 4 * 2
    assert work.products == work.total == 3 * one + local


def test_attention_is_charged_the_blocks_it_computes(benchmark):
    def gradients(query, key, value, segments):
        def loss(*arrays):
            return causal_attention(*arrays, segments, 1.0, implementation="tpu").sum()

        return jax.grad(loss, (0, 1, 2))(query, key, value)

    length, heads, width, value_width = 1024, 3, 24, 16
    arrays = [jnp.ones((2, length, heads, w)) for w in (width, width, value_width)]
    traced = jax.jit(gradients).trace(*arrays, jnp.ones((2, length), jnp.int32))
    work = benchmark.count_work(traced.jaxpr.jaxpr, benchmark.Routing(np.array([1]), 0), 1)
    # Two blocks of queries: one meets one block of keys, one meets two. The first product comes
    # again in both kernels of the backward pass, that of gradients and values in both, too.
    scores = 2 * heads * 3 * 512**2
    assert work.attention == 2 * scores * (5 * width + 4 * value_width)


def test_a_group_is_charged_the_pieces_it_touches(benchmark):
    # Tiles of 64 rows in pieces of 16: rows 0 to 19 touch two, rows 20 to 63 three.
    assert benchmark.Routing(np.array([20, 44]), 0).charged(64) == (32 + 48) / 64


def test_bytes_per_chip_of_each_method(benchmark, base):
    config, mesh = ModelConfig.load(base), make_mesh(data=2, expert=4)
    size, chosen = {}, ExpertConfig(EXPERTS)
    for method in benchmark.METHODS:
        program = benchmark.abstract_program(config, mesh, method, chosen, 8, 16, "full")
        parts = (program.state.tuned, program.state.opt_state, program.frozen)
        size[method] = [benchmark._local_bytes(part) for part in parts]
    # A tuned expert has three matrices of the model's width. Four devices: the third one has none.
    expert = 3 * config.hidden_size * config.expert_width
    tuned, moments, frozen = size["esft"]
    assert tuned == 4 * expert and 2 * tuned <= moments < 2 * tuned + 64
    experts = len(config.moe_layers) * config.router.num_experts // 4
    masked, masked_moments, _ = size["masked"]
    assert masked == 2 * experts * expert and masked_moments >= 2 * masked
    assert size["full-fp32"][0] == 2 * size["full-bf16"][0] == 2 * frozen
    assert size["full-fp32"][2] == 0


@pytest.mark.slow
def test_a_case(benchmark, base, tmp_path, capsys):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install libtpu")
    experts, output = tmp_path / "experts.json", tmp_path / "report.json"
    ExpertConfig(EXPERTS).save(experts)
    arguments = ["--model", base, "--experts", experts, "--output", output, "--length", 64]
    arguments += ["--slices", "v5e:2x2", "--methods", "esft"]
    benchmark.main([str(argument) for argument in arguments])
    (case,) = json.loads(output.read_text())["cases"]
    assert case["fits"] and case["chips"] == 4
    assert case["bytes"]["needed"] > case["bytes"]["temporary"] > 0
    assert case["operations"]["experts"] >= case["operations"]["experts_exact"] > 0
    assert "| v5e:2x2 | esft | full | yes |" in capsys.readouterr().out
