"""Kill a run again and again, resume it each time, and compare it with one that was left alone.

    python benchmarks/crash.py --config configs/quickstart.yaml --kills 30 [--signal TERM]

Every second signal (KILL, unless TERM is asked for) comes while the first or second checkpoint is
being written; the others come at a random moment, by turns before the first step (of reading,
scoring, compiling, resuming) and among the steps. Exits with 1 unless the adapters are equal bit
for bit, and no attempt logged a step that a complete checkpoint had. After SIGTERM every attempt
must end with code 0.
"""

import argparse
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


def start(config: Path, output: Path, overrides: Sequence[str]) -> subprocess.Popen:
    """The run, or its continuation; what it says is appended to a log beside its folder."""
    command = [sys.executable, "-m", "esft_jax.train", "--config", str(config), *overrides]
    with output.with_suffix(".log").open("a", encoding="utf-8") as log:
        return subprocess.Popen(
            [*command, f"output={output}"], stdout=log, stderr=subprocess.STDOUT, text=True
        )


def finish(process: subprocess.Popen, output: Path) -> None:
    """Wait for the end; raise if it is a bad one."""
    if process.wait():
        raise SystemExit(f"the run failed: {output.with_suffix('.log').read_text()[-2000:]}")


def saving(output: Path) -> set[str]:
    """The checkpoints that are being written, or were when a process was killed."""
    return {str(path) for path in (output / "checkpoints").glob("*/*.orbax-checkpoint-tmp")}


def saved_step(output: Path) -> int:
    """Step of the last complete checkpoint; 0 without one."""
    names = [path.name for path in (output / "checkpoints" / "last").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def first_step(log: str) -> int | None:
    """The first step that a process logged; step 0 is the evaluation before training."""
    found = re.search(r"^step ([1-9]\d*) of", log, re.MULTILINE)
    return int(found[1]) if found else None


@dataclass
class Moment:
    """When to send a signal.

    Attributes:
        save: while so many a checkpoint is being written; without it:
        delay: seconds after the start of the process, and no later than its first step;
        training: seconds after the first step instead.
    """

    save: int | None = None
    delay: float = 0.0
    training: bool = False


def kill_at(
    process: subprocess.Popen, output: Path, moment: Moment, written: int, number: signal.Signals
) -> bool:
    """Kill at a moment; `written` characters of the log are of earlier processes. False if the
    process ended before.
    """
    log, begin, before, begun = output.with_suffix(".log"), time.monotonic(), saving(output), 0
    stepped = None  # when the first step was seen
    while process.poll() is None:
        now = saving(output)
        begun += len(now - before)
        before = now
        if stepped is None and first_step(log.read_text()[written:]) is not None:
            stepped = time.monotonic()
        if moment.save is not None:
            due = bool(now) and begun >= moment.save
        elif moment.training:
            due = stepped is not None and time.monotonic() - stepped > moment.delay
        else:
            due = stepped is not None or time.monotonic() - begin > moment.delay
        if due:
            process.send_signal(number)
            code = process.wait()
            if number == signal.SIGTERM and code:
                raise SystemExit(f"SIGTERM: exit code {code}; expected 0")
            return True
        time.sleep(0.002)
    return False


@dataclass
class Outcome:
    """What became of a run that was killed.

    Attributes:
        moments, saves: kills at random moments, and during saves.
        repeated: attempts that began at or before a step that was saved.
        resumed: the last step that an attempt began after.
        same: its adapter is that of the run left alone.
    """

    moments: int = 0
    saves: int = 0
    repeated: int = 0
    resumed: int = 0
    same: bool = False


def crash(
    config: Path,
    folder: Path,
    overrides: Sequence[str],
    kills: int,
    seed: int,
    number: signal.Signals,
) -> Outcome:
    """One run left alone, and one that is killed and continued."""
    draw, alone, killed = random.Random(seed), folder / "alone", folder / "killed"
    begin = time.monotonic()
    process = start(config, alone, overrides)
    while process.poll() is None and not (alone / "metrics.jsonl").exists():
        time.sleep(0.1)
    first = time.monotonic()
    finish(process, alone)
    starting, training = first - begin, time.monotonic() - first
    outcome, log = Outcome(), killed.with_suffix(".log")
    for attempt in range(kills + 1):
        saved, written = saved_step(killed), len(log.read_text()) if log.exists() else 0
        process = start(config, killed, overrides)
        if number == signal.SIGTERM:
            # While Python itself starts, nobody handles it yet.
            while process.poll() is None and log.stat().st_size == written:
                time.sleep(0.01)
        if attempt == kills:
            finish(process, killed)
        elif attempt % 2:
            moment = Moment(save=draw.randint(1, 2))
            outcome.saves += kill_at(process, killed, moment, written, number)
        else:
            # So short a time among the steps that most signals find a run to kill.
            moment = Moment(delay=draw.uniform(0, starting))
            if attempt % 4:
                moment = Moment(delay=draw.uniform(0, training / kills), training=True)
            outcome.moments += kill_at(process, killed, moment, written, number)
        began = first_step(log.read_text()[written:])
        if began is not None:
            outcome.repeated += began <= saved
            outcome.resumed = saved
    results = [(run / "adapter" / "model.safetensors").read_bytes() for run in (alone, killed)]
    outcome.same = results[0] == results[1]
    return outcome


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--signal", choices=["KILL", "TERM"], default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        number = signal.Signals[f"SIG{args.signal}"]
        found = crash(args.config, Path(folder), args.overrides, args.kills, args.seed, number)
    print(
        f"{number.name}: {found.moments} times at random moments, {found.saves} times while saving"
    )
    print(f"attempts that repeated saved steps: {found.repeated}; last resumed: {found.resumed}")
    print(f"adapter as without: {'the same bits' if found.same else 'DIFFERENT'}")
    return 0 if found.same and not found.repeated and found.resumed else 1


if __name__ == "__main__":
    sys.exit(main())
