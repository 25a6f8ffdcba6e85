"""The benchmark that plans the configurations of `configs/pods`: which they are, and its rows."""

from pathlib import Path

import pytest

from esft_jax.config import RunConfig
from esft_jax.planning.analysis import make_plan, open_case

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(script):
    return script("pod_plans")


def test_every_configuration_has_a_topology_that_it_names(benchmark):
    folder = ROOT / "configs" / "pods"
    assert {path.stem for path in folder.iterdir()} == benchmark.PODS.keys()
    for name, topology in benchmark.PODS.items():
        assert f"--topology {topology})" in (folder / f"{name}.yaml").read_text()


def test_a_row_of_the_table(benchmark, base, capsys):
    config = RunConfig(
        model=str(base),
        output="none",
        data={"train": ("none",), "sequence_length": 64},
        score={"sequence_length": 64},
        train={"batch_size": 8},
    )
    benchmark.report({"tiny": make_plan(open_case(config, "cpu:8")).to_json()})
    *_, row = capsys.readouterr().out.splitlines()
    # What an unknown device has, and how fast it is, stays empty.
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:4] == ["tiny", "cpu:8", "8", "yes"]
    assert cells[8:10] == ["", ""] and cells[-3:-1] == ["", ""]
