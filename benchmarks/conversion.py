"""Convert a checkpoint of DeepSeek-V2-Lite's shape, kill and resume it, export it, load it.

    python benchmarks/conversion.py --layers 9 --folder /tmp/conversion

Weights are random; what is measured does not depend on them. Every measured step is a process of
its own, its start included, and begins with its input outside the page cache; what it and the plain
copy write is on the disk (fsync) before the clock stops. Peak memory is all that the process had
resident, mapped files included; of several processes, the largest. Needs free disk of twice the
checkpoint and ten GB. Exits with 1 if a result differs from what it should be, or needs more memory
than is promised.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from unittest import mock

import measuring
import ml_dtypes
import numpy as np

from esft_jax.checkpoint.folder import TensorSpec, write_tensors
from esft_jax.families import load_model_config, tensor_table

MODEL = Path(__file__).parents[1] / "models" / "deepseek-v2-lite" / "config.json"
SHARD_BYTES = 5_000_000_000  # as `export` cuts them: its files must come out equal
SPARE_DISK = 10 << 30
CONSTANT = 1_500_000_000


def generate(folder: Path, layers: int, smaller: int = 1) -> int:
    """Write a checkpoint with random weights; bytes of its largest tensor.

    Args:
        smaller: divides all widths, and the vocabulary.
    """
    raw = json.loads(MODEL.read_text()) | {"num_hidden_layers": layers}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"):
        raw[key] //= smaller
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(raw))
    placements = tensor_table(load_model_config(folder)).places
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    specs = {name: TensorSpec(bfloat16, place.shape) for name, place in placements.items()}
    largest = max(spec.num_bytes for spec in specs.values())
    draw = np.random.default_rng(0)
    # Tensors are windows into one block of random numbers, each at an offset of its own.
    values = np.empty(largest // 2 + 1_000_003, bfloat16)
    for begin in range(0, len(values), 1 << 22):
        part = values[begin : begin + (1 << 22)]
        part[:] = draw.standard_normal(len(part), np.float32) * 0.02

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, spec in specs.items():
            begin = draw.integers(len(values) - spec.num_bytes // 2)
            yield name, values[begin:][: spec.num_bytes // 2].reshape(spec.shape)

    write_tensors(folder, specs, tensors(), SHARD_BYTES)
    return largest


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def num_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def to_disk(folder: Path, *, forget: bool = False) -> None:
    """Wait until all files are on the disk; `forget` takes them out of the page cache."""
    for path in files(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    found = {}
    for path in files(folder):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def copy(source: Path, target: Path) -> float:
    """Seconds of a plain copy, which is removed again."""
    to_disk(source, forget=True)
    begin = time.perf_counter()
    shutil.copytree(source, target)
    to_disk(target)
    seconds = time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds


def run(commands: Sequence[Sequence[str]], source: Path, target: Path) -> tuple[float, int]:
    """Seconds that processes take together, and the peak memory of the largest, in bytes."""
    to_disk(source, forget=True)
    begin = time.perf_counter()
    processes = [start(command) for command in commands]
    peak = 0
    try:
        while any(process.poll() is None for process in processes):
            peak = max([peak, *(resident_peak(process.pid) for process in processes)])
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
    to_disk(target)
    seconds = time.perf_counter() - begin
    if any(process.returncode for process in processes):
        raise SystemExit(f"failed: {' '.join(commands[0])}")
    return seconds, peak


def start(command: Sequence[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)


def resident_peak(pid: int) -> int:
    """Peak of a process so far, mapped files included; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(x.split()[1]) * 1024 for x in lines if x.startswith("VmHWM")), 0)


def convert(source: Path, target: Path, processes: int = 1) -> list[list[str]]:
    command = [sys.executable, "-m", "esft_jax.convert", "--from", str(source), "--to", str(target)]
    if processes == 1:
        return [command]
    return [[*command, *flags] for flags in process_flags(processes)]


def process_flags(processes: int) -> list[list[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = ["--distributed", "--coordinator", f"localhost:{port}", "--processes"]
    return [[*together, str(processes), "--process", str(i)] for i in range(processes)]


def kill_half_way(command: Sequence[str], target: Path, tensors: int) -> int:
    """Kill a conversion once its journal has half of the tensors; how many it has then."""
    process = start(command)
    finished = 0
    while finished < tensors // 2:
        if process.poll() is not None:
            raise SystemExit("the conversion ended before it could be killed")
        time.sleep(0.005)
        finished = sum(p.read_bytes().count(b"\n") for p in target.glob("conversion-*.jsonl"))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if (target / "manifest.json").exists():
        raise SystemExit("the conversion was complete before it was killed")
    return finished


def load_share(folder: Path, report: Path, argv: Sequence[str]) -> None:
    """In a process of several: load a folder on four devices; report the bytes read and held."""
    import jax

    from esft_jax.checkpoint.load import load_base
    from esft_jax.checkpoint.tensor_files import TensorFiles
    from esft_jax.cli import add_process_arguments, join_processes
    from esft_jax.processes import split_cpu
    from esft_jax.sharding import make_mesh

    parser = argparse.ArgumentParser()
    add_process_arguments(parser)
    split_cpu(4)
    join_processes(parser.parse_args(argv))
    read = 0
    original = TensorFiles.read

    def counted(self: TensorFiles, *key: object) -> np.ndarray:
        nonlocal read
        part = original(self, *key)
        read += part.nbytes
        return part

    begin = time.perf_counter()
    from flax import nnx

    with mock.patch.object(TensorFiles, "read", counted):
        model = load_base(folder, mesh=make_mesh(2, 4)).model
    seconds = time.perf_counter() - begin
    # Copies of a part on several devices of a process count once.
    held = 0
    for leaf in jax.tree.leaves(nnx.state(model)):
        parts = {str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}
        held += sum(parts.values())
    path = report.with_suffix(f".{jax.process_index()}")
    path.write_text(json.dumps({"read": read, "held": held, "seconds": seconds}))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=27, help="of the model; 27 is all of it")
    parser.add_argument("--smaller", type=int, default=1, help="divides widths, to try this out")
    parser.add_argument("--load-layers", type=int, default=2, help="of the model to load directly")
    parser.add_argument("--folder", type=Path, required=True, help="new folder on a large disk")
    parser.add_argument("--report", type=Path, default=Path("build/conversion.json"))
    args, others = parser.parse_known_args(arguments)
    if others[:1] == ["load"]:
        load_share(args.folder, args.report, others[1:])
        return 0
    if others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.folder.mkdir(parents=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that large files never stay
    try:
        report = measure(args.folder, args.layers, args.smaller, args.load_layers)
    finally:
        shutil.rmtree(args.folder)
    measuring.write_report(args.report, report)
    print_report(report)
    return 0 if all(report["checks"].values()) else 1


def measure(folder: Path, layers: int, smaller: int, load_layers: int) -> dict:
    source, target, other = (folder / name for name in ("source", "target", "other"))
    report: dict = {"machine": measuring.machine(len(os.sched_getaffinity(0))), "layers": layers}
    largest = generate(source, layers, smaller)
    size = num_bytes(source)
    if shutil.disk_usage(folder).free < size + SPARE_DISK:
        raise SystemExit(f"needs {size + SPARE_DISK:,} bytes of free disk; use fewer --layers")
    tensors = len(tensor_table(load_model_config(source)).places)
    original = content(source)
    steps: dict[str, dict[str, float]] = {}
    checks: dict[str, bool] = {}
    report |= {"bytes": size, "largest": largest, "steps": steps, "checks": checks}

    def note(name: str, seconds: float, peak: int | None = None, part: float = 1) -> None:
        steps[name] = {"seconds": seconds, "MB_per_s": part * size / 1e6 / seconds}
        if peak is not None:
            steps[name]["peak_bytes"] = peak
            checks[f"memory: {name}"] = peak <= 3 * largest + CONSTANT
        print(name, steps[name], file=sys.stderr, flush=True)

    note("copy", copy(source, other))
    note("convert", *run(convert(source, target), source, target))
    expected = content(target)
    shutil.rmtree(target)  # first of all, so that the disk never holds a third one
    note("copy, again", copy(source, other))
    # A kill half way.
    [command] = convert(source, target)
    to_disk(source, forget=True)
    finished = kill_half_way(command, target, tensors)
    seconds, peak = run([command], source, target)
    note("convert, the rest after a kill", seconds, peak, 1 - finished / tensors)
    checks["same files after a kill"] = content(target) == expected
    shutil.rmtree(target)
    note("convert, 2 processes", *run(convert(source, target, 2), source, target))
    checks["same files from 2 processes"] = content(target) == expected
    shutil.rmtree(source)
    export = [sys.executable, "-m", "esft_jax.export", "--base", str(target), "--to", str(other)]
    note("export", *run([export], target, other))
    shutil.rmtree(target)
    found = content(other)
    weights = [name for name in original if name.endswith(".safetensors")]
    checks["same weights after the way back"] = all(original[n] == found[n] for n in weights)
    shutil.rmtree(other)
    generate(source, load_layers, smaller)
    me = [sys.executable, __file__, "--folder", str(source), "--report", str(folder / "load")]
    run([[*me, "load", *flags] for flags in process_flags(2)], source, source)
    report["load"] = [json.loads((folder / f"load.{i}").read_text()) for i in range(2)]
    report["load_bytes"] = num_bytes(source)
    checks["no process reads more than it holds"] = all(
        part["read"] <= part["held"] for part in report["load"]
    )
    fastest_copy = max(steps["copy"]["MB_per_s"], steps["copy, again"]["MB_per_s"])
    report["of_copy"] = {
        name: step["MB_per_s"] / fastest_copy
        for name, step in steps.items()
        if "peak_bytes" in step
    }
    return report


def print_report(report: dict) -> None:
    print(
        f"{report['layers']} layers, {report['bytes'] / 1e9:.1f} GB, largest tensor "
        f"{report['largest'] / 1e6:.0f} MB; memory promised: "
        f"{(3 * report['largest'] + CONSTANT) / 1e6:.0f} MB\n"
    )
    rows = []
    for name, step in report["steps"].items():
        share, peak = report["of_copy"].get(name), step.get("peak_bytes")
        rows.append(
            [
                name,
                f"{step['seconds']:.0f}",
                f"{step['MB_per_s']:.0f}",
                "" if share is None else f"{share:.2f}",
                "" if peak is None else f"{peak / 1e6:.0f}",
            ]
        )
    measuring.print_table(["step"], ["s", "MB/s", "of the faster copy", "peak MB"], rows)
    for number, part in enumerate(report["load"]):
        print(
            f"\ndirect load, process {number} of 2: read {part['read'] / 1e6:.0f} of "
            f"{report['load_bytes'] / 1e6:.0f} MB, holds {part['held'] / 1e6:.0f} MB, "
            f"{part['seconds']:.0f} s",
            end="",
        )
    print("\n")
    for name, passed in report["checks"].items():
        print(f"{'yes' if passed else 'NO '}  {name}")


if __name__ == "__main__":
    sys.exit(main())
