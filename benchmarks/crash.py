"""Kill a run again and again, resume it each time, and compare it with one that was left alone.

    python benchmarks/crash.py --config configs/quickstart.yaml --kills 30

Every second kill (SIGKILL) comes at a random moment, from the start of the process on; the others
come while a checkpoint is being written. Exits with 1 unless the adapters are equal bit for bit.
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
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


def saving(output: Path) -> bool:
    """Whether a checkpoint is being written now."""
    return any((output / "checkpoints").glob("*/*.orbax-checkpoint-tmp"))


def kill_at(process: subprocess.Popen, output: Path, delay: float | None) -> bool:
    """Kill after so many seconds, or while a checkpoint is written. False if it ended before."""
    begin = time.monotonic()
    while process.poll() is None:
        if saving(output) if delay is None else time.monotonic() - begin > delay:
            process.kill()
            process.wait()
            return True
        time.sleep(0.002)
    return False


def crash(
    config: Path, folder: Path, overrides: Sequence[str], kills: int, seed: int
) -> tuple[int, int, bool]:
    """Kills at random moments, kills during saves, and whether the results are the same."""
    moments, alone, killed = random.Random(seed), folder / "alone", folder / "killed"
    begin = time.monotonic()
    process = start(config, alone, overrides)
    while process.poll() is None and not (alone / "metrics.jsonl").exists():
        time.sleep(0.1)
    training = time.monotonic()
    finish(process, alone)
    # An eighth of the steps between two kills, at most: most of them find a run to kill.
    latest = training - begin + (time.monotonic() - training) / 8
    done = [0, 0]
    for number in range(kills):
        process, in_save = start(config, killed, overrides), number % 2
        delay = None if in_save else moments.uniform(0, latest)
        if not kill_at(process, killed, delay):
            finish(process, killed)
            break  # it ended before its time came: nothing is left to kill
        done[in_save] += 1
    else:
        finish(start(config, killed, overrides), killed)
    results = [(run / "adapter" / "model.safetensors").read_bytes() for run in (alone, killed)]
    return *done, results[0] == results[1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        moments, saves, same = crash(
            args.config, Path(folder), args.overrides, args.kills, args.seed
        )
    print(f"killed {moments} times at random moments and {saves} times while saving")
    print(f"adapter as without: {'the same bits' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
