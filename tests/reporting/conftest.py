"""Two tasks of the model in `base`, scored on made-up routing, what a sweep found, and a report."""

import json
from pathlib import Path

import numpy as np
import pytest

from esft_jax.families import load_model_config
from esft_jax.report import main
from esft_jax.routing.log import RoutingLog
from esft_jax.routing.scores import ExpertScores
from esft_jax.sweeping.config import BASE, Cell, config_sha256, load_sweep, run_config
from esft_jax.sweeping.record import CellResult, Record


def write_scores(folder: Path, layers: tuple[int, ...], num_experts: int, seed: int) -> None:
    """Sixty sequences of 25 tokens with two experts each; few experts are preferred."""
    rng = np.random.default_rng(seed)
    preferred = 4 * rng.random((len(layers), 1, num_experts)) ** 2
    noise = rng.gumbel(size=(len(layers), 60 * 25, num_experts))
    ids = np.argsort(-(preferred + noise), axis=-1)[..., :2]
    gates = rng.uniform(0.1, 0.4, ids.shape)
    tokens = rng.integers(300, 340, 60 * 25)
    log = RoutingLog(layers, num_experts, ids, gates, np.arange(0, 60 * 25 + 1, 25), tokens)
    counts, sums = (part.sum(axis=0) for part in log.sequence_sums())
    shares = log.sequence_sums(shares=True)[1].sum(axis=0)
    ExpertScores(
        layers,
        counts / (2 * log.num_tokens),
        sums / log.num_tokens,
        {"tokens": log.num_tokens},
        log,
        gate_share=shares / log.num_tokens,
    ).save(folder)


@pytest.fixture(scope="session")
def scored(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    config = load_model_config(base)
    folder = tmp_path_factory.mktemp("scored")
    paths = [folder / "one", folder / "two" / "scores"]  # scores, and those in a run's folder
    for seed, path in enumerate(paths):
        write_scores(path, config.moe_layers, config.router.num_experts, seed)
    return [paths[0], paths[1].parent]


@pytest.fixture(scope="session")
def sweep(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three methods on two tasks, each with two seeds."""
    folder = tmp_path_factory.mktemp("sweep")
    run = {
        "model": str(base),
        "output": "unset",
        "data": {"train": ["t.jsonl"], "valid": ["v.jsonl"]},
        "evaluation": {"data": "e.jsonl"},
    }
    (folder / "run.yaml").write_text(json.dumps(run))
    content = {
        "output": str(folder / "out"),
        "run": str(folder / "run.yaml"),
        "tasks": {"one": [], "two": ["evaluation.metric=chrf"]},
        "methods": {"full": ["method=full"], "token": [], "lora": ["method=lora"]},
        "seeds": [0, 1],
    }
    path = folder / "sweep.yaml"
    path.write_text(json.dumps(content))
    record, loaded = Record(folder / "out" / "results.jsonl"), load_sweep(path)
    for method, value, lost, trained in (
        (BASE, 1, 0.0, 0),
        ("full", 60, 0.8, 100),
        ("token", 59, 0.3, 10),
        ("lora", 40, 0.2, 5),
    ):
        for seed in (0, 1) if method != BASE else (0,):
            for task, more in (("one", 0.0), ("two", 10.0)):
                cell = Cell(task, method, None, seed)
                kept = {"python": 2 + lost, "poetry": 3 + lost}
                record.add(
                    CellResult(
                        cell,
                        config_sha256(run_config(loaded, cell)),
                        "chrf",
                        value + more + 2 * seed,
                        1.0,
                        retention=kept,
                        trained=trained,
                        total=100,
                        stored_bytes=40_000 * trained,
                        step_bytes=1_000_000,
                    )
                )
    return path


@pytest.fixture(scope="session")
def report(
    base: Path, scored: list[Path], sweep: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    output = tmp_path_factory.mktemp("report") / "out"
    arguments = [*map(str, scored), "--model", str(base), "--top-p", "0.5", "--sweep", str(sweep)]
    assert main([*arguments, "--sequence-length", "64", "--output", str(output)]) == 0
    return output
