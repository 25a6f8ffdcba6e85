"""The benchmark for an accelerator runs to its end on a CPU, with small models."""

import json

import pytest

from esft_jax.families import load_model_config


@pytest.fixture
def benchmark(script, monkeypatch):
    module = script("accelerator")

    def call(script, function, /, **arguments):
        assert script == "accelerator"
        return getattr(module, function)(**arguments)

    monkeypatch.setattr(module, "in_new_process", call)
    return module


@pytest.mark.slow
def test_it_runs_to_its_end(benchmark, short_run, tmp_path, capsys):
    output = tmp_path / "found.json"
    arguments = ["--config", str(short_run), "--length", "32", "--steps", "2", "--tiny"]
    benchmark.main([*arguments, "--output", str(output)])
    found = json.loads(output.read_text())
    assert [report["right"] for report in found["selfcheck"]] == [True]
    steps = {(step["model"], step["method"]): step for step in found["steps"]}
    assert list(steps) == [(m, method) for m in benchmark.MODELS for method in benchmark.METHODS]
    for step in steps.values():
        assert step["device"] == "cpu" and step["mfu"] is None  # unknown for a CPU
        assert step["flops_per_second"] > 0 and step["step_seconds"] > 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cpu")]
    assert len(table) == 4 and all("unknown" in line for line in table)


def test_out_of_memory_is_a_row(benchmark, monkeypatch, capsys):
    def refuse(*operands):
        raise MemoryError("no more")

    monkeypatch.setattr(benchmark, "step_shapes", refuse)
    found = benchmark.measure("qwen3-30b-a3b", "full", 1, 32, 1, tiny=True)
    benchmark.print_steps([found])
    assert "out of memory" in found["problem"] and "out of memory" in capsys.readouterr().out


def test_layers_are_the_lowest(benchmark):
    lite = load_model_config(benchmark.ROOT / "deepseek-v2-lite")
    cut = benchmark.lower_layers(lite, 2)
    assert (cut.num_layers, cut.moe_layers, cut.hidden_size) == (3, (1, 2), lite.hidden_size)
    assert benchmark.lower_layers(lite, 99) == lite
