"""Several processes of one run on this machine, by JAX's own runtime (gloo)."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

DEVICES, STEPS = 8, 20


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def environment_without_devices() -> dict[str, str]:
    """For processes that split the CPU themselves."""
    flags = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    return os.environ | {"XLA_FLAGS": " ".join(flags)}


def start(config: Path, output: Path, processes: int, *overrides: str) -> list[subprocess.Popen]:
    """The processes of a run, each with its share of eight devices."""
    port, environment = free_port(), environment_without_devices()
    started = []
    for process in range(processes):
        command = [sys.executable, "-m", "esft_jax.train", "--config", str(config)]
        if processes > 1:
            command += ["--distributed", "--coordinator", f"localhost:{port}"]
            command += ["--processes", str(processes), "--process", str(process)]
            command += ["--peer-timeout", "10"]
        command += [f"output={output}", f"mesh.cpu_devices={DEVICES // processes}"]
        command += ["mesh.data=2", "mesh.expert=4", *overrides]
        started.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return started


def finish(processes: list[subprocess.Popen], timeout: float = 300) -> list[str]:
    """Output of every process; all must end well."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert not any(process.returncode for process in processes), "\n\n".join(outputs)
    return outputs


def metrics(output: Path, name: str) -> np.ndarray:
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return np.array([line[name] for line in lines if name in line])


@pytest.fixture(scope="module")
def alone(short_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of one process with eight devices."""
    output = tmp_path_factory.mktemp("alone") / "run"
    finish(start(short_run, output, 1))
    return output


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_together_make_the_run_of_one(
    processes: int, short_run: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    first, *others = finish(start(short_run, output, processes))
    assert f"step {STEPS} of {STEPS}" in first
    for text in others:
        assert "step" not in text and "experts" not in text, text
    for name in ("train/loss", "valid/loss", "train/target_tokens", "train/grad_norm"):
        np.testing.assert_allclose(metrics(output, name), metrics(alone, name), rtol=0, atol=1e-5)
    chosen = [json.loads((folder / "expert_cfg.json").read_text()) for folder in (output, alone)]
    assert chosen[0] == chosen[1]
    mine, theirs = (load_file(f / "adapter" / "model.safetensors") for f in (output, alone))
    for name, tensor in mine.items():
        np.testing.assert_allclose(tensor, theirs[name], atol=1e-5)


def test_rows_stay_in_order_wherever_the_devices_of_a_process_lie(tmp_path: Path) -> None:
    """On a TPU slice, devices of different processes alternate in the mesh."""
    program = tmp_path / "program.py"
    program.write_text(INTERLEAVED)
    port, environment = free_port(), environment_without_devices()
    command = [sys.executable, str(program), str(port)]
    processes = [
        subprocess.Popen([*command, str(process)], env=environment, stdout=subprocess.PIPE)
        for process in range(2)
    ]
    for process in processes:
        *_, rows = process.communicate(timeout=60)[0].splitlines()
        assert json.loads(rows) == list(range(8))


INTERLEAVED = """
import json, sys
import jax
import numpy as np

from esft_jax.sharding import make_mesh, place_whole_batch

jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, int(sys.argv[2]))
devices = sorted(jax.devices(), key=lambda device: (device.id % 4, device.process_index))
assert [device.process_index for device in devices] == [0, 1] * 4
mesh = make_mesh(2, 4, devices)
rows = place_whole_batch({"rows": np.arange(8)}, mesh)["rows"]
replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
print(json.dumps(np.asarray(jax.jit(lambda x: x, out_shardings=replicated)(rows)).tolist()))
"""


@pytest.mark.slow
def test_processes_evaluate_together(short_run: Path, chats: Path, tmp_path: Path) -> None:
    others = f"evaluation.others={{chats: {{valid: [{chats}], format: messages}}}}"
    overrides = ["train.steps=2", f"evaluation.data={chats}", "evaluation.limit=12", others]
    overrides += ["evaluation.metric=chrf", "evaluation.max_new_tokens=5"]
    found, texts = [], []
    for processes in (1, 2):
        output = tmp_path / f"{processes}"
        texts += finish(start(short_run, output, processes, *overrides))[1:]
        files = sorted((output / "evaluation").rglob("scores.json"))
        # Without hashes: in its last bits the adapter depends on the number of processes.
        names = [re.sub("-[0-9a-f]{12}", "", str(f.relative_to(output))) for f in files]
        found.append(dict(zip(names, [json.loads(f.read_text()) for f in files], strict=True)))
    assert len(found[0]) == 4
    for name, alone in found[0].items():
        together = found[1][name]
        assert together["value"] == alone["value"]
        loss = together["heldout"]["nats_per_token"]
        assert loss == pytest.approx(alone["heldout"]["nats_per_token"], abs=1e-5)
    assert not any("before" in text for text in texts)


def wait_for(output: Path, step: int, processes: list[subprocess.Popen]) -> None:
    path = output / "metrics.jsonl"
    for _ in range(1200):
        if path.exists() and len(path.read_text().splitlines()) >= step:
            return
        assert all(process.poll() is None for process in processes), "a process ended early"
        time.sleep(0.1)
    pytest.fail(f"no step {step} within two minutes")


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(signal.SIGKILL, id="dead", marks=pytest.mark.slow),
        pytest.param(signal.SIGSTOP, id="stalled", marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_ends_the_run_and_another_count_continues_it(
    number: int, short_run: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    processes = start(short_run, output, 2)
    wait_for(output, 8, processes)
    processes[1].send_signal(number)
    began = time.monotonic()
    try:
        text = processes[0].communicate(timeout=60)[0]
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode not in (0, 2), text
    assert time.monotonic() - began < 40
    processes[1].communicate()
    # One process, on another mesh, takes it from the last checkpoint.
    resumed = start(short_run, output, 1, "mesh.data=4", "mesh.expert=2")
    finish(resumed)
    found, expected = (metrics(folder, "train/loss") for folder in (output, alone))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_more_of_them_continue(
    short_run: Path, alone: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    processes = start(short_run, output, 2)
    wait_for(output, 8, processes)
    processes[1].send_signal(signal.SIGTERM)
    first, _ = finish(processes)
    assert "the same command continues the run" in first
    assert not (output / "adapter").exists()
    finish(start(short_run, output, 4))
    found, expected = (metrics(folder, "train/loss") for folder in (output, alone))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
