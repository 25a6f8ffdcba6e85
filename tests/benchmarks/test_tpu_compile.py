"""The benchmark that compiles for TPU slices: its methods, and a case from end to end."""

import importlib.util
import json

import pytest

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.families import load_model_config
from esft_jax.planning.program import local_bytes
from esft_jax.sharding import make_mesh

EXPERTS = {1: (0, 7), 3: (2,)}


@pytest.fixture
def benchmark(script):
    return script("tpu_compile")


def test_bytes_per_chip_of_each_method(benchmark, base):
    config, mesh = load_model_config(base), make_mesh(data=2, expert=4)
    size, chosen = {}, ExpertConfig(EXPERTS)
    for method in benchmark.METHODS:
        run = benchmark.method_config(method, base, 8, 16, "full")
        shapes = benchmark.method_shapes(method, run, config, mesh, chosen)
        assert shapes.trace(run.train, run.data).jaxpr
        parts = (shapes.state.tuned, shapes.state.opt_state, shapes.frozen)
        size[method] = [local_bytes(part) for part in parts]
    # A tuned expert has three matrices of the model's width. Four devices: the third one has none.
    expert = 3 * config.hidden_size * config.expert_width
    tuned, moments, frozen = size["esft"]
    assert tuned == 4 * expert and 2 * tuned <= moments < 2 * tuned + 64
    experts = len(config.moe_layers) * config.router.num_experts // 4
    masked, masked_moments, _ = size["masked"]
    assert masked == 2 * experts * expert and masked_moments >= 2 * masked
    assert size["full-fp32"][0] == 2 * frozen
    # But for vectors, whose masters are float32 in any case.
    assert frozen < size["full-bf16"][0] < 1.02 * frozen
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
