"""How long a run takes to have its first batch of many short chats: the first time, and later.

    python benchmarks/data_start.py [--chats 100000 400000] [--model models/tiny-moe]

Generates chats of two and of four turns, some 340 bytes each, and starts on them twice, each time
in a process of its own: all that `train` does between its configuration and the first batch, but
for the weights. The second start finds the tokens in the cache. Memory is the peak of the process
above what it held before it read any data, mapped files included; `data` is what the file has.
Processor seconds are those of the process, without the one that renders templates: they tell what a
busy machine hides. Prints Markdown, writes JSON.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import (
    in_new_process,
    machine,
    peak_resident,
    pin,
    print_table,
    restart_peak,
    write_report,
)

COLUMNS = {
    "megabytes": ".0f",
    "million_tokens": ".1f",
    "seconds": ".1f",
    "processor_seconds": ".1f",
    "microseconds_per_chat": ".0f",
    "memory_of_data": ".2f",
}
_WORDS = 5_000


def generate(path: Path, count: int) -> None:
    """Writes a file of chats; the same for the same count."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(2, 9))) for _ in range(_WORDS)]

    def turn(role: str, most: int) -> dict[str, str]:
        return {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(3, most)))}

    with path.open("w") as file:
        for number in range(count):
            turns = 1 + number % 2
            messages = [
                message
                for _ in range(turns)
                for message in (turn("user", 16), turn("assistant", 24))
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def start(chats: str, model: str, cache: str) -> dict[str, Any]:
    """From a configuration to its first batch."""
    from esft_jax.config import RunConfig, TrainConfig
    from esft_jax.data.pipeline import train_iterator
    from esft_jax.data.tokenizer import Tokenizer
    from esft_jax.data_config import DataConfig
    from esft_jax.training.rows import read_rows

    data = DataConfig(train=(chats,), valid=0.01, sequence_length=1024, cache=cache)
    config = RunConfig(model, "none", data, train=TrainConfig(batch_size=8))
    tokenizer = Tokenizer.load(model)
    restart_peak()
    before, begin, used = peak_resident(), time.perf_counter(), time.process_time()
    task_set, train_set, _ = read_rows(config.data, tokenizer, config.seed)
    iterator = train_iterator(train_set, batch_size=8, seed=config.seed)
    next(iterator)
    seconds, used = time.perf_counter() - begin, time.process_time() - used
    iterator.close()
    return {
        "seconds": seconds,
        "processor_seconds": used,
        "memory": peak_resident() - before,
        "tokens": len(task_set.tokens),
        "kept": task_set.data.kept,
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chats", type=int, nargs="+", default=[100_000, 400_000])
    parser.add_argument("--model", default="models/tiny-moe")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("build/data_start.json"))
    args = parser.parse_args(argv)
    pin(args.threads)
    report: dict[str, Any] = {"machine": machine(args.threads), "starts": []}
    rows: list[list[str]] = []
    for count in args.chats:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chats.jsonl"
            generate(path, count)
            size = path.stat().st_size
            for which in ("first", "second"):
                found = in_new_process(
                    "data_start", "start", chats=str(path), model=args.model, cache=folder
                )
                if found["kept"] != (which == "second"):
                    raise SystemExit(f"{count} chats: tokens were not kept; expected more chats")
                report["starts"].append({"chats": count, "start": which, "bytes": size, **found})
                figures = {
                    "megabytes": size / 1e6,
                    "million_tokens": found["tokens"] / 1e6,
                    "seconds": found["seconds"],
                    "processor_seconds": found["processor_seconds"],
                    "microseconds_per_chat": found["seconds"] / count * 1e6,
                    "memory_of_data": found["memory"] / size,
                }
                numbers = (format(figures[name], spec) for name, spec in COLUMNS.items())
                rows.append([f"{count:,}", which, *numbers])
    names = [name.replace("_", " ") for name in COLUMNS]
    print_table(["chats", "start"], names, rows)
    write_report(args.output, report)


if __name__ == "__main__":
    main()
