"""The benchmark of grouped products, at a size that runs in a second."""

import json

import numpy as np
import pytest

from tests.yardstick import torch


@pytest.fixture
def benchmark(script, monkeypatch):
    module = script("grouped_matmul")
    tiny = module.Shape(experts=8, width=16, expert_width=24, top_k=2, tokens=32)
    monkeypatch.setattr(module, "SHAPES", {"tiny": tiny})
    return module


def test_every_contender_takes_part(benchmark, tmp_path, capsys):
    output, threads = tmp_path / "folder" / "report.json", torch.get_num_threads()
    benchmark.main(["--rounds", "1", "--threads", str(threads), "--output", str(output)])
    report = json.loads(output.read_text())
    operations = report["layers"]["tiny"]["operations"]
    assert operations.keys() == set(benchmark.OPERATIONS)
    contenders = {"dense, JAX", "dense, torch", "esft_jax", "torch loop", "torch grouped_mm"}
    for figures in operations.values():
        assert figures.keys() == contenders
        assert all(0 < f["gflops"] < np.inf for f in figures.values())
    assert report["before"]["cores"] and report["before"]["packages"]["jax"]
    assert len(capsys.readouterr().out.splitlines()) == 2 + len(operations) * len(contenders)


def test_flops_are_those_of_the_rows_that_count(benchmark):
    problem = benchmark.draw(benchmark.SHAPES["tiny"], "float32")
    assert problem.sizes.sum() == 64 and list(problem.sizes) == sorted(problem.sizes)[::-1]
    assert problem.flops("dW") == 2 * 64 * 16 * 24
    assert problem.flops("dW tuned") == 2 * problem.sizes[0] * 16 * 24


def test_a_wrong_result_stops_it(benchmark):
    right = np.ones((4, 4), np.float32)
    wrong = right + 0.01 * np.eye(4, dtype=np.float32)
    benchmark.check({"dense, JAX": lambda: wrong, "a": lambda: right, "b": lambda: right}, 1e-3)
    with pytest.raises(SystemExit, match="b differs"):
        benchmark.check({"a": lambda: right, "b": lambda: wrong}, 1e-3)


def test_a_shape_that_does_not_fit_is_left_out(benchmark, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(benchmark, "available_bytes", lambda: 1000)
    benchmark.main(["--threads", str(torch.get_num_threads()), "--output", str(tmp_path / "r")])
    assert "tiny: left out" in capsys.readouterr().out
