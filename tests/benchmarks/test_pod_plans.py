"""The benchmark that plans the configurations of `configs/pods`: which they are, and its rows."""

import dataclasses
from pathlib import Path

import pytest

from esft_jax.adapt.expert_config import ExpertConfig
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


# Planned before plans were kept: their figures are those of docs/pods.md.
UNRECORDED = {"v5e-8", "v5e-8x2", "v5e-64", "v5p-16", "v6e-8", "deepseek-v2-v5p-128"}


def test_every_configuration_fits_by_its_record(benchmark):
    record = benchmark.read_record(benchmark.RECORD)
    for case in benchmark.pod_cases(list(benchmark.PODS), benchmark.TRANSPORTS[:1]):
        if case.path.stem not in UNRECORDED:
            plan = record[case.key]  # of the configuration as it is now
            assert plan is not None and plan["fits"] and plan["memory"]["needed"] is not None
    plans = [plan for plan in record.values() if plan and plan["experts_overhead"]]
    # One row of 4096 tokens gives an expert few blocks of rows, whose ends weigh more.
    single = [plan["experts_overhead"] for plan in plans if plan["tokens"] == 4096]
    others = [plan["experts_overhead"] for plan in plans if plan["tokens"] > 4096]
    assert others and max(others) <= 1.1
    assert single and max(single) <= 1.2


def test_a_case_is_planned_once(benchmark, monkeypatch, tmp_path):
    made, record = [], tmp_path / "plans.jsonl"
    refused = "v5e-64", "ragged_all_to_all"

    def make_plan(case):
        made.append(case)
        transport = case.overrides[0].partition("=")[2]
        return None if (case.path.stem, transport) == refused else {"name": case.name}

    monkeypatch.setattr(benchmark, "make_plan", make_plan)
    cases = list(benchmark.pod_cases(["v5e-8", "v5e-64"], benchmark.TRANSPORTS))
    plans = benchmark.make_plans(cases[:2], record)
    assert benchmark.make_plans(cases, record) | plans == benchmark.make_plans(cases, record)
    assert made == cases and len(set(made)) == 4
    assert [plan for plan in benchmark.read_record(record).values() if plan is None] == [None]


def test_what_a_plan_depends_on(benchmark, tmp_path):
    keys = set()
    for experts in ({0: [1]}, {0: [2]}):
        file = tmp_path / f"{experts[0][0]}.json"
        ExpertConfig({0: tuple(experts[0])}).save(file)
        given = {"qwen3-30b-a3b": file}
        esft, full = benchmark.fit_cases(["qwen3-30b-a3b"], benchmark.METHODS, ["h100:8"], given)
        keys |= {esft.key, full.key}
        assert (esft.per_layer, full.per_layer) == (None, None)
    assert len(keys) == 3  # the experts are none of full fine-tuning's business
    (assumed,) = benchmark.fit_cases(["qwen3-30b-a3b"], ["esft"], ["h100:8"], {})
    assert assumed.per_layer and assumed.key not in keys
    assert assumed.key == dataclasses.replace(assumed).key
    # The same step under another name is the same plan.
    (olmoe,) = benchmark.fit_cases(["olmoe-1b-7b"], ["esft"], ["h100:1"], {})
    (pod,) = benchmark.pod_cases(["olmoe-1b-7b-h100x1"], ["all_gather"])
    assert olmoe.key == pod.key


def test_what_fits_where(benchmark, capsys):
    def plan(method, needed):
        memory = {"frozen": 1e9, "tuned": 2e9, "moments": 4e9, "needed": needed, "available": 8e9}
        fits = (needed or 9e9) <= 8e9
        words = {"method": method, "experts": "some", "experts_overhead": 1.02}
        return words | {"memory": memory, "fits": fits}

    esft, full = (
        benchmark.Case("m", "v5e:2x4", (f"method={method}",)) for method in benchmark.METHODS
    )
    other = dataclasses.replace(esft, topology="h100:1")
    plans = {esft: plan("esft", 7.54e9), other: plan("esft", 9e9), full: plan("full", None)}
    benchmark.report_fits(plans)
    printed = capsys.readouterr().out
    assert "| model | method | trained | v5e:2x4 (8.0 GB) | h100:1 (8.0 GB) |" in printed
    assert "| m | esft | some | 7.5 | no (9.0) |" in printed
    assert "| m | full | some | no (over 7.0) |  |" in printed
    assert printed.endswith("at most 1.020\n")


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
