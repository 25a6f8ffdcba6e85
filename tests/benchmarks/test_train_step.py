"""The benchmark of the training step: its contenders must be doing the same work."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from tests.yardstick import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "train_step.py"


@pytest.fixture
def benchmark(script):
    return script("train_step")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What all contenders read, by family."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)
        train_step, step_jax = map(importlib.import_module, ("train_step", "step_jax"))
    size = train_step.SIZES["tiny"]

    @cache
    def prepare(family):
        folder, config = tmp_path_factory.mktemp(family), train_step.FAMILIES[family](size)
        assert config["model_type"] == family
        load = step_jax.prepare(folder, config, size.batch, count=3, shares=[10])
        assert 0.1 < load["10"] < 1  # those with the most tokens
        return folder

    return prepare


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("deepseek_v2", "forward"),
        ("deepseek_v2", "esft-10"),
        ("deepseek_v2", "full"),
        ("qwen3_moe", "esft-10"),
        ("qwen3_moe", "full"),
        ("olmoe", "full"),
        ("qwen3_5_moe_text", "esft-10"),
        ("qwen3_5_moe_text", "full"),
    ],
)
def test_contenders_compute_the_same(benchmark, script, monkeypatch, folders, family, method):
    folder = folders(family)

    def call(module, function, **arguments):
        return getattr(script(module), function)(**arguments)

    monkeypatch.setattr(benchmark, "in_new_process", call)
    found = {}
    for name in benchmark.CONTENDERS:
        found[name] = benchmark.measure(
            folder,
            name,
            method,
            remat="none",
            warmup=1,
            steps=2,
            threads=torch.get_num_threads(),
        )
        assert len(found[name].seconds) == 2 and len(found[name].losses) == 3
        assert len(found[name].grad_norms) == (0 if method == "forward" else 3)
        assert 0 < found[name].peak_bytes <= found[name].process_peak_bytes
    assert benchmark.differences({method: {name: [run] for name, run in found.items()}}) == []


@pytest.fixture
def results(benchmark):
    run = benchmark.Measured([2.0, 1.0, 4.0], [3.0, 2.0], [1.0, 1.0], 100, 200, 50)

    def faster(factor, **changes):
        return [replace(run, seconds=[s / factor for s in run.seconds], **changes)]

    return {
        "full": {"esft_jax": faster(2), "torch modules": faster(1.0)},
        "esft-10": {
            "esft_jax": faster(4, peak_bytes=40),
            "torch modules": faster(1.0),
            "transformers grouped_mm": faster(1.6),
        },
    }


def test_bars_are_ratios_to_the_best_torch_and_to_our_own_full_step(benchmark, results):
    figures = benchmark.summary(results, tokens=10)
    assert figures["esft-10"]["esft_jax"]["tokens_per_second"] == pytest.approx(20)
    assert [ratio for _, ratio, _ in benchmark.bars(figures)] == pytest.approx([2.5, 2, 0.5, 0.4])
    del figures["full"]
    assert len(benchmark.bars(figures)) == 1


@pytest.mark.parametrize("what", ["losses", "grad_norms"])
def test_another_result_is_reported(benchmark, results, what):
    assert benchmark.differences(results) == []
    run = results["esft-10"]["torch modules"][0]
    values = getattr(run, what)
    results["esft-10"]["torch modules"] = [replace(run, **{what: [values[0], 1.01 * values[1]]})]
    found = benchmark.differences(results)
    assert len(found) == 2 and all("torch modules" in line and what in line for line in found)
    results["esft-10"]["torch modules"] = [replace(run, **{what: [float("nan")] * 2})]
    assert len(benchmark.differences(results)) == 4


def test_a_report_is_written_and_differences_end_in_an_error(
    benchmark, results, monkeypatch, tmp_path, capsys
):
    run = results["full"]["torch modules"][0]
    losses = {"step_jax": [3.0, 2.0], "step_torch": [3.0, 2.0]}

    def call(module, function, **arguments):
        return {} if function == "prepare" else replace(run, losses=losses[module])

    monkeypatch.setattr(benchmark, "in_new_process", call)
    output = tmp_path / "folder" / "report.json"
    arguments = ["--family", "qwen3_moe", "--methods", "full", "esft-10", "--output", str(output)]
    benchmark.main(arguments)
    report = json.loads(output.read_text())
    assert report["model"]["model_type"] == "qwen3_moe"
    assert report["figures"]["full"].keys() == set(benchmark.CONTENDERS)
    assert all(len(runs) == 3 for runs in report["runs"]["esft-10"].values())
    assert len(report["bars"]) == 4 and report["before"]["processor"]
    assert "| esft-10 | esft_jax | 1024 | 2.000 |" in capsys.readouterr().out
    losses["step_jax"] = [3.0, 2.1]
    with pytest.raises(SystemExit, match="step 1, losses: esft_jax 2.1"):
        benchmark.main(["--methods", "full", "--output", str(output)])


def test_a_measurement_has_a_process_of_its_own(benchmark):
    assert benchmark.in_new_process("os", "getpid") != os.getpid()


@pytest.mark.slow
def test_the_whole_script(tmp_path):
    output = tmp_path / "report.json"
    options = ["--size", "tiny", "--rounds", "1", "--steps", "1", "--methods", "esft-10"]
    # The session's flags for JAX are not for what is to be measured.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    subprocess.run(
        [sys.executable, str(SCRIPT), *options, "--output", str(output)],
        check=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )
    assert len(json.loads(output.read_text())["figures"]["esft-10"]) == 3
