"""What a step of each method of a sweep costs: time, memory, and what is stored.

    python benchmarks/method_cost.py [--config configs/paper/main.yaml]

Trains each method for some steps on the sweep's first task, without evaluation, each in a process
of its own. Methods alternate, round after round, so that a disturbance of the machine meets all of
them; reported are medians over rounds. Prints Markdown, writes JSON.
"""

import argparse
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from measuring import in_new_process, machine, pin, print_table, write_report

from esft_jax.config import EvaluationConfig
from esft_jax.huge_pages import restart_with_huge_pages
from esft_jax.processes import split_cpu
from esft_jax.reporting.findings import size_text
from esft_jax.sweeping.config import load_sweep, run_config, search_cells
from esft_jax.training.loop import run_training
from esft_jax.training.setup import open_setup

HEAD = ["trained", "s/step", "step memory", "stored"]


@dataclass(frozen=True)
class Cost:
    """Of a method.

    Attributes:
        trained_share: of the parameters.
        step_seconds: median over steps.
        step_bytes: arguments and temporaries of a step, per device.
        stored_bytes: of the result.
    """

    trained_share: float
    step_seconds: float
    step_bytes: int
    stored_bytes: int

    @property
    def texts(self) -> list[str]:
        """As `HEAD`."""
        stored, step = size_text(self.stored_bytes), size_text(self.step_bytes)
        return [f"{self.trained_share:.1%}", f"{self.step_seconds:.3f}", step, stored]


def measure(sweep_path: Path, method: str, steps: int) -> Cost:
    """Train a method for some steps, with the first of its learning rates."""
    sweep = load_sweep(sweep_path)
    config = run_config(sweep, next(c for c in search_cells(sweep) if c.method == method))
    with tempfile.TemporaryDirectory() as folder:
        config = replace(
            config,
            output=f"{folder}/run",
            train=replace(config.train, steps=steps, eval_every=steps, save_every=steps),
            optimizer=replace(config.optimizer, warmup_steps=0),  # fewer than any `steps`
            evaluation=EvaluationConfig(),
        )
        split_cpu(config.mesh.cpu_devices)
        result = run_training(open_setup(config), say=lambda line: None)
        assert result.result and result.timing.step and result.step_bytes
        stored = sum(path.stat().st_size for path in result.result.glob("*.safetensors"))
    share = result.trained / result.total
    return Cost(share, result.timing.step.p50, result.step_bytes, stored)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/paper/main.yaml"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--output", type=Path, default=Path("build/method_cost.json"))
    args = parser.parse_args(arguments)

    pin(args.threads)
    before, methods = machine(args.threads), list(load_sweep(args.config).methods)
    runs: dict[str, list[Cost]] = {method: [] for method in methods}
    for number, method in itertools.product(range(args.rounds), methods):
        how = {"sweep_path": args.config, "method": method, "steps": args.steps}
        cost = in_new_process("method_cost", "measure", **how)
        runs[method].append(cost)
        print(f"round {number + 1}: {method}: {cost.step_seconds:.3f} s/step", flush=True)
    figures = {
        method: replace(costs[0], step_seconds=statistics.median(c.step_seconds for c in costs))
        for method, costs in runs.items()
    }
    print()
    print_table(["method"], HEAD, [[method, *cost.texts] for method, cost in figures.items()])
    report = {"before": before, "after": machine(args.threads), "config": str(args.config)}
    report |= {"steps": args.steps, "runs": {m: [asdict(c) for c in cs] for m, cs in runs.items()}}
    write_report(args.output, report | {"figures": {m: asdict(c) for m, c in figures.items()}})


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
