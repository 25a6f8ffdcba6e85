"""What the benchmarks share: the machine and its load, memory marks, timed steps, reports."""

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "transformers")
_LINUX = sys.platform == "linux"


def pin(threads: int) -> None:
    """Keep this process and those it will start on the first `threads` of its cores.

    XLA sizes its thread pools by the cores it may use. Elsewhere than on Linux it takes all.
    """
    if _LINUX:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])


def machine(threads: int) -> dict[str, Any]:
    """Facts to judge figures by; `load` tells whether others were using the machine."""
    processor = platform.processor()
    if _LINUX:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((x.split(": ")[1] for x in lines if x.startswith("model name")), processor)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load": os.getloadavg(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(name: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(name)
    return None


def available_bytes() -> int:
    """Memory that may still be taken without swapping; elsewhere than on Linux, all there is."""
    pages = "SC_AVPHYS_PAGES" if _LINUX else "SC_PHYS_PAGES"
    free = os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")
    if _LINUX:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next((int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvail")), free)
    return free


def peak_resident() -> int:
    """Most bytes of memory this process has held, since `restart_peak` where that works."""
    if _LINUX:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM"))
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def restart_peak() -> None:
    """Forget the peak so far (loading, compiling). Where the system refuses, it stays included.

    Memory that is free, but kept by the C library's allocator, is handed back first.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def in_new_process(module: str, function: str, **arguments: Any) -> Any:
    """Call a function of a module in a fresh process; nothing of it is imported here."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(_call, module, function, arguments).result()


def _call(module: str, function: str, arguments: dict[str, Any]) -> Any:
    return getattr(importlib.import_module(module), function)(**arguments)


@dataclass(frozen=True)
class Measured:
    """One run of one contender in a process of its own.

    Attributes:
        seconds: of each step after the warm-up.
        losses: of every step, warm-up included, nats per token.
        grad_norms: global norm of the gradients of all trained parameters, before clipping;
            empty when nothing is trained.
        peak_bytes: resident memory, at most, from the first step on.
        process_peak_bytes: the same with loading and compiling.
        compiled_bytes: arguments and temporaries by the compiler's own count, where there is one.
    """

    seconds: list[float]
    losses: list[float]
    grad_norms: list[float]
    peak_bytes: int
    process_peak_bytes: int
    compiled_bytes: int | None = None


def run_steps(
    step: Callable[[int], tuple[float, float | None]],
    warmup: int,
    steps: int,
    compiled_bytes: int | None = None,
) -> Measured:
    """Call `step(index) -> (loss, gradient norm)`, which must wait for its results."""
    loading = peak_resident()
    restart_peak()
    seconds, losses, norms = [], [], []
    for index in range(warmup + steps):
        begin = time.perf_counter()
        loss, norm = step(index)
        if index >= warmup:
            seconds.append(time.perf_counter() - begin)
        losses.append(loss)
        if norm is not None:
            norms.append(norm)
    peak = peak_resident()
    return Measured(seconds, losses, norms, peak, max(loading, peak), compiled_bytes)


def alternate(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    pause: float = 0.02,
    turn: float = 0.1,
) -> dict[str, float]:
    """Median seconds of each contender over rounds in which all take their turn.

    Between turns there is a pause: idle threads of a pool spin for a while and would take the next
    contender's cores. After it, a first call that does not count wakes the contender's own threads
    and gives it memory, as in a program that works on. Calls that take less than a turn are
    repeated until it is over: a single one of a few milliseconds says little.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(pause)
            run()
            begin, calls, taken = time.perf_counter(), 0, 0.0
            while taken < turn:
                run()
                calls, taken = calls + 1, time.perf_counter() - begin
            seconds[name].append(taken / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_table(words: Sequence[str], numbers: Sequence[str], rows: Iterable[list[str]]) -> None:
    """A Markdown table: columns of words, then columns of numbers, aligned to the right."""
    print("| " + " | ".join([*words, *numbers]) + " |")
    print("|" + "---|" * len(words) + "--:|" * len(numbers))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write results as JSON, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
