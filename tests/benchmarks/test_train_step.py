"""The benchmark of the training step: its contenders must be doing the same work."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch


@pytest.fixture
def benchmark(script):
    return script("train_step")


@pytest.fixture
def in_this_process(benchmark, script, monkeypatch):
    """Measurements without processes of their own; `threads` as the session has them."""

    def call(module, function, **arguments):
        if "threads" in arguments:
            arguments["threads"] = torch.get_num_threads()
        return getattr(script(module), function)(**arguments)

    monkeypatch.setattr(benchmark, "in_new_process", call)


@pytest.mark.parametrize("method", ["forward", "esft-10", "full"])
def test_contenders_compute_the_same(benchmark, in_this_process, tmp_path, capsys, method):
    output = tmp_path / "report.json"
    options = ["--config", "tiny", "--rounds", "1", "--steps", "2", "--methods", method]
    benchmark.main([*options, "--output", str(output)])  # exits with an error if they do not
    report = json.loads(output.read_text())
    assert report["figures"][method].keys() == set(benchmark.CONTENDERS)
    for (run,) in report["runs"][method].values():
        assert len(run["seconds"]) == 2 and len(run["losses"]) == 3
        assert len(run["grad_norms"]) == (0 if method == "forward" else 3)
        assert 0 < run["peak_bytes"] <= run["process_peak_bytes"]
    assert ("tokens/s over the best torch" in capsys.readouterr().out) == (method != "forward")


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


def test_a_measurement_has_a_process_of_its_own(benchmark):
    assert benchmark.in_new_process("os", "getpid") != os.getpid()


@pytest.mark.slow
def test_the_whole_script(tmp_path):
    output = tmp_path / "report.json"
    options = ["--config", "tiny", "--rounds", "1", "--steps", "1", "--methods", "esft-10"]
    script = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
    # The session's flags for JAX are not for what is to be measured.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    subprocess.run(
        [sys.executable, str(script), *options, "--output", str(output)],
        check=True,
        env=environment | {"JAX_PLATFORMS": "cpu"},
    )
    assert len(json.loads(output.read_text())["figures"]["esft-10"]) == 3
