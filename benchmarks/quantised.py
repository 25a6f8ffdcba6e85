"""What quantised frozen weights do to a model's losses, to a step's time, and to what is learned.

    python benchmarks/quantised.py [--parts losses steps task]

- `losses`: held-out loss of the base in float32, by scheme.
- `steps`: a training step in bfloat16, by scheme of the experts. Schemes alternate, round after
  round, so that a disturbance of the machine meets all of them; reported are medians over rounds.
- `task`: the whole run of the configuration, by scheme and seed: its metric beside the quantised
  base, and that of the same adapter on the base in full precision.

Each figure comes from a process of its own. Prints Markdown, writes JSON.
"""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measuring import in_new_process, machine, pin, print_table, write_report

from esft_jax.checkpoint.load import load_base
from esft_jax.config import EvaluationConfig, QuantiseConfig, RunConfig, load_config
from esft_jax.data.pipeline import build_dataset
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.evaluation.run import (
    OWN,
    check_evaluation,
    evaluate_in_full_precision,
    evaluate_result,
)
from esft_jax.evaluation.tasks import heldout_loss
from esft_jax.huge_pages import restart_with_huge_pages
from esft_jax.training.loop import run_training
from esft_jax.training.setup import open_setup

HELD_OUT = tuple(sorted(map(str, Path("data/held_out").glob("*.jsonl"))))
# Of the experts, and of the rest.
SCHEMES = {
    "none": {},
    "int8": {"experts": "int8"},
    "int4": {"experts": "int4"},
    "mxfp4": {"experts": "mxfp4"},
    "int8, rest int8": {"experts": "int8", "rest": "int8"},
    "int4, rest int8": {"experts": "int4", "rest": "int8"},
}


def held_out_loss(path: Path, scheme: str) -> float:
    """Nats per token of the base on text that it was not trained on."""
    config = load_config(path)
    base = load_base(config.model, np.float32, None, QuantiseConfig(**SCHEMES[scheme]).chosen)
    dataset = build_dataset(
        HELD_OUT,
        Tokenizer.load(base.source.folder),
        format="text",
        sequence_length=config.data.sequence_length,
        too_long="cut",
        seed=config.seed,
    )
    return heldout_loss(base.model, dataset, config.evaluation.batch_size).nats_per_token


def _named(path: Path, scheme: str, output: str, **changes: Any) -> RunConfig:
    quantise = QuantiseConfig(**SCHEMES[scheme])
    config = load_config(path)
    return dataclasses.replace(config, output=output, quantise=quantise, **changes)


def step_seconds(path: Path, scheme: str, steps: int) -> float:
    """Median of the updates of a short run in bfloat16."""
    with tempfile.TemporaryDirectory() as folder:
        train = dataclasses.replace(
            load_config(path).train, steps=steps, eval_every=steps, save_every=steps
        )
        optimizer = dataclasses.replace(load_config(path).optimizer, warmup_steps=0)
        config = _named(
            path,
            scheme,
            f"{folder}/run",
            dtype="bfloat16",
            train=train,
            optimizer=optimizer,
            evaluation=EvaluationConfig(),
        )
        timing = run_training(open_setup(config), say=lambda line: None).timing
    assert timing.step is not None
    return timing.step.p50


def task_metric(path: Path, scheme: str, seed: int) -> list[float]:
    """Percent of the run's task: beside the base that it was trained on, and in full precision."""
    with tempfile.TemporaryDirectory() as folder:
        config = _named(path, scheme, f"{folder}/run", seed=seed)
        result = run_training(open_setup(config), say=lambda line: None).result
        inputs = check_evaluation(config)
        assert result is not None
        beside = evaluate_result(config, result, inputs)
        exact = evaluate_in_full_precision(config, result, inputs, print) or beside
    values = [report.scores[OWN].value for report in (beside, exact)]
    return [value for value in values if value is not None]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parts = ("losses", "steps", "task")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3], help="of `task`")
    parser.add_argument("--output", type=Path, default=Path("build/quantised.json"))
    args = parser.parse_args(arguments)

    pin(args.threads)
    report: dict[str, Any] = {"before": machine(args.threads), "config": str(args.config)}
    cells: dict[str, list[str]] = {scheme: [] for scheme in args.schemes}
    heading = []

    def of(function: str, scheme: str, **more: Any) -> Any:
        return in_new_process("quantised", function, path=args.config, scheme=scheme, **more)

    if "losses" in args.parts:
        heading += ["held-out loss, nats per token", "over that without"]
        found = {scheme: of("held_out_loss", scheme) for scheme in args.schemes}
        for scheme, loss in found.items():
            cells[scheme] += [f"{loss:.4f}", f"{loss / found['none'] - 1:+.2%}"]
        report["losses"] = found
    if "steps" in args.parts:
        heading += ["step in bfloat16, s", "over that without"]
        runs: dict[str, list[float]] = {scheme: [] for scheme in args.schemes}
        for _, scheme in itertools.product(range(args.rounds), args.schemes):
            runs[scheme].append(of("step_seconds", scheme, steps=args.steps))
        medians = {scheme: statistics.median(seconds) for scheme, seconds in runs.items()}
        for scheme, seconds in medians.items():
            cells[scheme] += [f"{seconds:.3f}", f"{seconds / medians['none']:.2f}"]
        report["steps"] = runs
    if "task" in args.parts:
        heading += ["task, %: mean (each seed)", "in full precision, %: mean"]
        report["task"] = {
            scheme: [of("task_metric", scheme, seed=seed) for seed in args.seeds]
            for scheme in args.schemes
        }
        for scheme, values in report["task"].items():
            beside, exact = zip(*values, strict=True)
            each = ", ".join(f"{value:.1f}" for value in beside)
            cells[scheme].append(f"{statistics.mean(beside):.1f} ({each})")
            cells[scheme].append(f"{statistics.mean(exact):.1f}")
    print_table(["quantised"], heading, [[scheme, *texts] for scheme, texts in cells.items()])
    write_report(args.output, report | {"after": machine(args.threads)})


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
