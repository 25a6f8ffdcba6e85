"""What input and checkpoints cost a training run, beside a run on a constant batch.

    python benchmarks/input_overlap.py [--config configs/quickstart.yaml] [KEY=VALUE ...]

Trains as configured, in turns of a few steps within one run: on real data right after a checkpoint
was asked for, on real data, and on the last batch again and again. Everything is the training
loop's own: the seconds of a turn are those that it logs, and its last step is waited for. The
turns of a cycle follow each other, so that a disturbance of the machine meets all of them; ratios
are taken within a cycle. Reported are medians over cycles. Prints Markdown, writes JSON.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from measuring import machine, pin, print_table, write_report

from esft_jax.config import RunConfig, load_config
from esft_jax.huge_pages import restart_with_huge_pages
from esft_jax.processes import split_cpu
from esft_jax.training import loop
from esft_jax.training.setup import open_setup

SAVED, REAL, CONSTANT = TURNS = ("real data, after a save", "real data", "constant batch")
COLUMNS = {"step_seconds": ".4f", "of_constant": ".3f", "waiting_share": ".3%"}


class Turns:
    """The iterator of the training data; in every third turn it repeats its last batch.

    `waited` holds the seconds that the loop waited for each batch.
    """

    def __init__(self, iterator: Any, steps: int):
        self._iterator, self._steps = iterator, steps
        self.get_state, self.set_state = iterator.get_state, iterator.set_state
        self.close = iterator.close
        self.waited: list[float] = []

    def __next__(self) -> Any:
        begin = time.perf_counter()
        if TURNS[len(self.waited) // self._steps % len(TURNS)] != CONSTANT:
            self._batch = next(self._iterator)
        self.waited.append(time.perf_counter() - begin)
        return self._batch


def measure(config: RunConfig, steps: int) -> dict[str, Any]:
    """Train in turns of so many steps.

    Returns:
        By turn, `seconds` per step and those of them that were `waited` for a batch; `blocked`,
        the seconds after which each save returned. All without the first cycle.
    """
    make_iterator, save = loop.train_iterator, loop.Checkpoints.save
    turns: list[Turns] = []
    blocked: list[float] = []

    def take_turns(*args: Any, **kwargs: Any) -> Turns:
        turns.append(Turns(make_iterator(*args, **kwargs), steps))
        return turns[0]

    def timed_save(*args: Any) -> None:
        begin = time.perf_counter()
        save(*args)
        blocked.append(time.perf_counter() - begin)

    with (
        mock.patch.object(loop, "train_iterator", take_turns),
        mock.patch.object(loop.Checkpoints, "save", timed_save),
    ):
        result = loop.run_training(open_setup(config))
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").open()]
    tokens = config.train.batch_size * config.data.sequence_length
    rate = "speed/tokens_per_second"
    seconds = [tokens / line[rate] for line in lines if rate in line]
    waited = np.reshape(turns[0].waited, (-1, steps)).mean(axis=1).tolist()
    return {
        # The save at the end of a cycle is met by the next one.
        "blocked": blocked[:-1],
        **{
            name: {turn: values[i :: len(TURNS)][1:] for i, turn in enumerate(TURNS)}
            for name, values in (("seconds", seconds), ("waited", waited))
        },
    }


def summary(measured: dict[str, Any], steps: int) -> dict[str, Any]:
    """Medians over cycles."""
    seconds, waited = measured["seconds"], measured["waited"]
    saved = zip(seconds[SAVED], seconds[REAL], strict=True)
    return {
        "turns": {
            turn: {
                "step_seconds": statistics.median(seconds[turn]),
                "of_constant": _of(seconds[turn], seconds[CONSTANT]),
                "waiting_share": _of(waited[turn], seconds[turn]),
            }
            for turn in TURNS
        },
        "save_blocks_seconds": statistics.median(measured["blocked"]),
        "save_costs_seconds": statistics.median(steps * (a - b) for a, b in saved),
    }


def _of(some: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(some, others, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("configs/quickstart.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="keys to replace in it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=24, help="cycles that count; one precedes")
    parser.add_argument("--steps", type=int, default=4, help="of each turn")
    parser.add_argument("--output", type=Path, default=Path("build/input_overlap.json"))
    args = parser.parse_args(arguments)

    pin(args.threads)
    before, cycle = machine(args.threads), len(TURNS) * args.steps
    with tempfile.TemporaryDirectory() as folder:
        length = [f"train.steps={(args.rounds + 1) * cycle}", f"train.save_every={cycle}"]
        rest = [f"train.log_every={args.steps}", "data.valid=[]", f"output={folder}/run"]
        config = load_config(args.config, [*args.overrides, *length, *rest])
        split_cpu(config.mesh.cpu_devices)
        measured = measure(config, args.steps)
        state = Path(folder, "run/checkpoints/last")
        size = sum(path.stat().st_size for path in state.rglob("*") if path.is_file())
    figures = summary(measured, args.steps)
    print()
    print_table(
        ["turn"],
        ["s/step", "of constant", "waiting for input"],
        [
            [turn, *(f"{f[key]:{form}}" for key, form in COLUMNS.items())]
            for turn, f in figures["turns"].items()
        ],
    )
    print(
        f"\n- a save of {size / 2**20:.1f} MiB returns after {figures['save_blocks_seconds']:.3f} s"
        f" and costs the {args.steps} steps after it {figures['save_costs_seconds']:.3f} s"
    )
    report = {"before": before, "after": machine(args.threads), "config": str(args.config)}
    report |= {"overrides": args.overrides, "steps": args.steps, "checkpoint_bytes": size}
    write_report(args.output, report | {"figures": figures, "measured": measured})


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
