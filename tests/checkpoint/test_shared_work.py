"""Conversion and loading by several real processes of this machine, some of which are killed."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from flax import nnx

from esft_jax.checkpoint.convert import (
    _begin,
    _convert_share,
    _finish,
    _leaf_dtypes,
    convert_checkpoint,
)
from esft_jax.checkpoint.load import load_base
from esft_jax.checkpoint.quantise import quantise_converted
from esft_jax.checkpoint.source import HuggingFaceSource
from esft_jax.ops.quantisation import Quantisation
from esft_jax.sharding import make_mesh

HOW, QUANTISE = Quantisation("int4", "int8", 16), "experts=int4,rest=int8,group_size=16"

# A process that converts; one that is to be killed does that itself, at a tensor it has begun.
CONVERT = """
import os, signal, sys
from esft_jax.convert import main
from esft_jax.checkpoint.source import HuggingFaceSource

last, digest = sys.argv[1], HuggingFaceSource.digest

def killed(self, name):
    if name == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return digest(self, name)

HuggingFaceSource.digest = killed
sys.exit(main(sys.argv[2:]))
"""

# A process that loads onto its half of eight devices, and then asks for the fingerprint.
LOAD = """
import argparse, hashlib, json, sys
import jax
import numpy as np
from flax import nnx
from esft_jax.ops.quantisation import Quantisation
from esft_jax.cli import add_process_arguments, join_processes
from esft_jax.checkpoint.load import load_base
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.processes import split_cpu
from esft_jax.sharding import make_mesh

parser = argparse.ArgumentParser()
parser.add_argument("folder")
parser.add_argument("report")
add_process_arguments(parser)
args = parser.parse_args()
split_cpu(4)
join_processes(args)
read, original = [0], TensorFiles.read

def counted(self, *key):
    part = original(self, *key)
    read[-1] += part.nbytes
    return part

TensorFiles.read = counted
base = load_base(args.folder, "float32", make_mesh(1, 8))
leaves = jax.tree.leaves(nnx.state(base.model))
held = sum(
    sum({str(s.index): s.data.nbytes for s in leaf.addressable_shards}.values()) for leaf in leaves
)
read.append(0)
report = {"fingerprint": base.fingerprint, "held": held, "loading": read[0], "hashing": read[1]}
quantised = load_base(args.folder, "float32", make_mesh(1, 8), Quantisation("int4", "int8", 16))
shards = {
    f"{number} {shard.index}": hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
    for number, leaf in enumerate(jax.tree.leaves(nnx.state(quantised.model)))
    for shard in leaf.addressable_shards
}
report |= {"shards": shards}
with open(f"{args.report}.{jax.process_index()}", "w") as file:
    json.dump(report, file)
"""


def start(code, *arguments, processes=1):
    """Processes that run the same code; several of them join each other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    started = []
    for process in range(processes):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        if processes > 1:
            command += ["--distributed", "--coordinator", f"localhost:{port}"]
            command += ["--processes", str(processes), "--process", str(process)]
            command += ["--peer-timeout", "10"]
        started.append(
            subprocess.Popen(
                command,
                env=os.environ | {"XLA_FLAGS": " ".join(flags)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(processes):
    """Exit codes and outputs."""
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory):
    """Every file of the conversion that nothing disturbed."""
    folder = tmp_path_factory.mktemp("expected") / "converted"
    convert_checkpoint(tiny[1], folder, origin=str(tiny[1]), quantisations=[HOW])
    return content(folder)


def test_one_process_is_killed_and_two_complete_its_work(tiny, expected, tmp_path):
    names, target = list(HuggingFaceSource(tiny[1]).placements), tmp_path / "target"
    flags = ["--from", tiny[1], "--to", target]
    codes, outputs = finish(start(CONVERT, names[len(names) // 2], *flags))
    assert codes == [-signal.SIGKILL], outputs
    assert not (target / "manifest.json").exists()
    flags += ["--quantise", QUANTISE]
    codes, outputs = finish(start(CONVERT, "", *flags, processes=2))
    assert codes == [0, 0], outputs
    assert "Converted" in outputs[0] and "Converted" not in outputs[1]
    assert content(target) == expected


def test_a_process_that_comes_late_shares_out_the_same_work(tiny, expected, tmp_path):
    """The other has finished its share already, and said so."""
    source, target = HuggingFaceSource(tiny[1]), tmp_path / "target"
    dtypes = _leaf_dtypes(source)
    _begin(target, source)
    for process in (1, 0):
        _convert_share(source, target, dtypes, process, 2)
    _finish(source, target, dtypes, str(tiny[1]))
    quantise_converted(target, HOW)
    assert content(target) == expected


@pytest.mark.slow
def test_an_unexpected_error_of_one_process_ends_both(tiny, tmp_path):
    names, target = list(HuggingFaceSource(tiny[1]).placements), tmp_path / "target"
    code = CONVERT.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError(name)")
    begin = time.monotonic()
    codes, outputs = finish(start(code, names[-3], "--from", tiny[1], "--to", target, processes=2))
    assert 0 not in codes and 2 not in codes, outputs
    assert any(f"RuntimeError: {names[-3]}" in output for output in outputs)
    assert time.monotonic() - begin < 100  # JAX's own patience is 300 seconds
    assert not (target / "manifest.json").exists()


@pytest.mark.slow
def test_one_of_two_is_killed_and_one_completes_their_work(tiny, expected, tmp_path):
    names, target = list(HuggingFaceSource(tiny[1]).placements), tmp_path / "target"
    flags = ["--from", tiny[1], "--to", target, "--quantise", QUANTISE]
    codes, outputs = finish(start(CONVERT, names[-3], *flags, processes=2))
    assert codes[0] not in (0, 2) and codes[1] == -signal.SIGKILL, outputs
    assert not (target / "manifest.json").exists()
    noted = [path.read_text().count("\n") for path in sorted(target.glob("conversion-*.jsonl"))]
    assert len(noted) == 2 and 0 < sum(noted) < len(names)
    codes, outputs = finish(start(CONVERT, "", *flags))
    assert codes == [0], outputs
    assert content(target) == expected


@pytest.mark.slow
def test_bad_input_of_one_process_ends_both(tiny, tmp_path):
    target = tmp_path / "target"
    code = CONVERT.replace(
        "os.kill(os.getpid(), signal.SIGKILL)",
        "raise __import__('esft_jax.errors').errors.InputError('this is wrong')",
    )
    names = list(HuggingFaceSource(tiny[1]).placements)
    flags = ["--from", tiny[1], "--to", target]
    codes, outputs = finish(start(code, names[-3], *flags, processes=2))
    assert codes == [2, 2], outputs
    assert f"error: {target}: conversion: failed on another process" in outputs[0]
    assert "error: this is wrong" in outputs[1]


def test_two_processes_read_their_own_parts_and_hash_half_each(tiny, tmp_path):
    codes, outputs = finish(start(LOAD, tiny[1], tmp_path / "report", processes=2))
    assert codes == [0, 0], outputs
    reports = [json.loads((tmp_path / f"report.{i}").read_text()) for i in range(2)]
    source = load_base(tiny[1]).source
    sizes = [source.num_bytes(name) for name in source.placements]
    for report in reports:
        assert report["loading"] == report["held"] < 0.6 * sum(sizes)
        assert abs(report["hashing"] - sum(sizes) / 2) <= max(sizes) / 2
        assert report["fingerprint"] == source.fingerprint
    assert sum(report["hashing"] for report in reports) == sum(sizes)
    model = load_base(tiny[1], "float32", make_mesh(1, 8), HOW).model
    shards = {
        f"{number} {shard.index}": hashlib.sha256(np.asarray(shard.data).tobytes()).hexdigest()
        for number, leaf in enumerate(jax.tree.leaves(nnx.state(model)))
        for shard in leaf.addressable_shards
    }
    assert all(set(report["shards"]) < set(shards) for report in reports)
    assert reports[0]["shards"] | reports[1]["shards"] == shards
