"""`plan`: the step is the one that `train` runs, and what is said about it."""

import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import AbstractMesh

from esft_jax import plan
from esft_jax.accelerators import GPUS
from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.config import RunConfig, load_config, save_config
from esft_jax.errors import InputError
from esft_jax.families import load_model_config
from esft_jax.planning.analysis import make_plan, open_case
from esft_jax.planning.suggest import suggestions
from esft_jax.sharding import DATA, EXPERT, REPLICA, make_mesh
from esft_jax.training import loop
from esft_jax.training.fit import check_fit
from esft_jax.training.result import Outcome
from esft_jax.training.setup import open_setup
from esft_jax.training.timing import Stopwatch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def make_config(base, chats, tmp_path):
    def make(**changes) -> RunConfig:
        experts = tmp_path / "experts.json"
        ExpertConfig({1: (0, 7), 3: (2,)}).save(experts)
        values = {
            "model": str(base),
            "output": str(tmp_path / "run"),
            "expert_cfg": str(experts),
            "dtype": "bfloat16",
            "mesh": {"expert": 4},
            "data": {"train": (str(chats),), "sequence_length": 64},
            "score": {"sequence_length": 64},
            "train": {"steps": 4, "batch_size": 16, "micro_batches": 2, "remat": "full"},
        }
        return RunConfig(**(values | changes))

    return make


FULL = {"method": "full", "expert_cfg": None, "init": "random"}
FULL |= {"train": {"batch_size": 8, "balance_loss": 0.01}}
FULL |= {"optimizer": {"rates": {"experts": 1e-4, "router": 1e-3}}}
LORA = {"method": "lora", "lora": {"rank": 2, "targets": ("attention", "selected_experts")}}
LEAN = {"optimizer": {"name": "muon", "moments": "bfloat16", "masters": "bfloat16"}}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="esft"),
        pytest.param(FULL, id="full"),
        pytest.param(LORA, id="lora", marks=pytest.mark.slow),
        pytest.param(LORA | LEAN, id="lora-lean"),
        pytest.param(FULL | LEAN, id="full-lean", marks=pytest.mark.slow),
    ],
)
def test_the_step_is_the_one_that_train_runs(changes, make_config, monkeypatch) -> None:
    config = make_config(**changes)
    compiled = []

    def keep_step(run: loop._Run, stopped, trackers) -> Outcome:
        compiled.append(run)
        return Outcome(0, None, None, Stopwatch(0.0).timing())

    monkeypatch.setattr(loop._Run, "train", keep_step)
    loop.run_training(open_setup(config), say=lambda text: None)
    (run,) = compiled
    memory = run.train_step.memory_analysis()
    planned = make_plan(open_case(config, "cpu:8")).memory
    assert planned.temporary == memory.temp_size_in_bytes
    assert planned.needed == (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    assert planned.tuned == sum(
        x.addressable_data(0).nbytes for x in jax.tree.leaves(run.state.tuned)
    )
    assert planned.moments == sum(
        x.addressable_data(0).nbytes for x in jax.tree.leaves(run.state.opt_state)
    )
    assert planned.frozen == sum(x.addressable_data(0).nbytes for x in jax.tree.leaves(run.frozen))
    assert planned.fits and planned.available is None


def test_the_command(make_config, tmp_path, capsys) -> None:
    path, output = tmp_path / "run.yaml", tmp_path / "plan.json"
    save_config(make_config(expert_cfg=None), path)
    arguments = ["--config", path, "--topology", "cpu:8", "--compare", "full", "--json", output]
    arguments += ["--experts-per-layer", 3, "train.remat=none"]
    assert plan.main([str(argument) for argument in arguments]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "3 of 8 experts in each layer, assumed" in printed and "full" in printed
    esft, full = json.loads(output.read_text())
    assert (esft["method"], full["method"], esft["tokens"]) == ("esft", "full", 128)
    assert esft["mesh"] == {"replica": 1, "data": 2, "expert": 4}
    assert esft["memory"]["moments"] < full["memory"]["moments"]
    assert esft["memory"]["frozen"] > full["memory"]["frozen"] == 0
    assert esft["received"]["all-gather"] > 0
    assert 0 < esft["model_operations"] < full["model_operations"]
    assert esft["experts_overhead"] is None  # only kernels for TPUs are counted


def test_what_lora_trains_is_said_and_counted(make_config) -> None:
    every = open_case(make_config(method="lora", expert_cfg=None), "cpu:8")
    assert every.described == "rank 8 on attention, dense_mlps, shared_experts, experts"
    given = open_case(make_config(**LORA), "cpu:8")
    assert given.described == "rank 2 on attention, 3 of 24 experts, as chosen"
    state = given.shapes().state.tuned
    width, heads, latent = 32, 2, 16
    sides = width + heads * 24 + width + latent + 8 + latent + heads * 32 + heads * 16 + width
    # On a group of four devices, three experts take a row on each of them.
    factors = 2 * (4 * sides + 4 * 3 * (width + 16))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == factors
    config = make_config(**LORA | {"expert_cfg": None})
    assert "2 of 8 experts in each layer, assumed" in open_case(config, "cpu:8", 2).described
    with pytest.raises(InputError, match="--experts-per-layer: the run selects no experts"):
        open_case(make_config(method="lora", expert_cfg=None), "cpu:8", 2)


def test_what_does_not_fit_together_is_one_line(make_config, tmp_path, capsys) -> None:
    path = tmp_path / "run.yaml"
    save_config(make_config(), path)

    def message(topology: str, *others: str) -> str:
        assert plan.main(["--config", str(path), "--topology", topology, *others]) == 2
        return capsys.readouterr().err

    assert "topology: 'v5e:many'; expected a TPU slice" in message("v5e:many")
    assert "JAX has split this CPU into 8" in message("cpu:64")
    assert "mesh: 4 devices; expected all 8 of cpu:8" in message("cpu:8", "mesh.data=1")
    assert "--experts-per-layer: the run has" in message("cpu:8", "--experts-per-layer", "1")
    few = ("expert_cfg=null", "--experts-per-layer", "9")
    assert "--experts-per-layer: 9; expected 1 to 8" in message("cpu:8", *few)
    assert "micro_batches: 4 rows cannot be split" in message("cpu:8", "train.micro_batches=4")
    rates = (
        "optimizer.rates={router: 1.0}",
        "optimizer.rates: router: it is not trained; expected",
    )
    assert f"{rates[1]} some of experts" in message("cpu:8", rates[0])
    bare = ("expert_cfg=null", "select.also=[head]")
    assert "select.also: head: the model has no such parameters" in message("cpu:8", *bare)


_QUANTISED = {"experts": "int4", "rest": "int8"}
_LEAN = {"moments": "bfloat16", "masters": "bfloat16"}


def test_suggestions_come_with_their_numbers(make_config) -> None:
    config = make_config(mesh={"expert": 2}, train={"batch_size": 16, "remat": "dots"})
    case = open_case(config, "cpu:8")
    fitting = make_plan(case)
    state = fitting.memory.state

    def texts(available: int) -> list[str]:
        memory = dataclasses.replace(fitting.memory, available=available)
        return suggestions(case, dataclasses.replace(fitting, memory=memory))

    expert, quantised, lean, rows, remat, larger = texts(fitting.memory.working + state * 3 // 5)
    split = case.state_bytes(make_mesh(1, 8))
    assert split < state
    assert expert.startswith("mesh.data=-1 mesh.expert=8:") and f"{split / 1e9:.2f} GB" in expert
    for text, keys, changed in (
        (quantised, "quantise.experts=int4 quantise.rest=int8", {"quantise": _QUANTISED}),
        (lean, "optimizer.moments=bfloat16 optimizer.masters=bfloat16", {"optimizer": _LEAN}),
    ):
        other = dataclasses.replace(case, config=dataclasses.replace(config, **changed))
        less = other.state_bytes(case.mesh)
        assert less < state
        assert text.startswith(f"{keys}: weights and moments take {less / 1e9:.2f} GB")
    assert rows.startswith("train.micro_batches=2: one row per device at a time instead of 2")
    assert remat.startswith("train.remat=full instead of dots")
    kept = f"{4 * 2 * 64 * 32 * 2 / 1e9:.2f} GB per device"
    assert kept in remat and "with train.remat=offload" in remat
    assert larger.startswith("16 devices of this kind with mesh.expert=4")
    assert len(texts(fitting.memory.working // 2)) == 5  # no slice is large enough
    (host,) = [t for t in texts(fitting.memory.needed - 1) if t.startswith("frozen_memory=host")]
    streamed = dataclasses.replace(case, config=dataclasses.replace(config, frozen_memory="host"))
    assert f"take {streamed.state_bytes(case.mesh) / 1e9:.2f} GB instead of" in host
    # Replicas share nothing: an expert group lies within one.
    twice = make_config(mesh={"replica": 2, "expert": 2}, train={"batch_size": 16})
    replicated = open_case(twice, "cpu:8")
    short = dataclasses.replace(fitting.memory, available=1, needed=None)
    expert, *_ = suggestions(replicated, dataclasses.replace(fitting, memory=short))
    assert expert.startswith("mesh.data=-1 mesh.expert=4:")
    full = dataclasses.replace(case, config=make_config(**FULL), trained=None)
    memory = dataclasses.replace(fitting.memory, available=1, needed=None)
    method, *_ = suggestions(full, dataclasses.replace(fitting, memory=memory))
    assert method.startswith("method=esft:") and "1 of 8 experts in each layer, assumed" in method


def test_any_method_is_compared_with_full_fine_tuning(make_config) -> None:
    lora = make_config(method="lora", expert_cfg=None, lora={"rank": 4, "targets": ("attention",)})
    assert plan._full(lora).method == "full"
    assert plan._full(make_config(expert_cfg=None, select={"also": ("router",)})).method == "full"


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", "v6e:2x4", "v5p:2x2x2", "2xv5e:2x4"])
def test_a_slice_of_tpus(topology, make_config, tmp_path) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install libtpu")
    path, output = tmp_path / "run.yaml", tmp_path / "plan.json"
    save_config(make_config(), path)
    # A process of its own: the compiler ends it when something is wrong.
    command = [sys.executable, "-m", "esft_jax.plan", "--topology", topology, "--json", output]
    slices = 2 if topology.startswith("2x") else 1
    command += ["--config", path, f"train.batch_size={16 * slices}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text())
    assert found["mesh"] == {"replica": slices, "data": 2, "expert": 4} and found["fits"]
    assert found["operations"] > found["model_operations"] > 0
    assert found["experts_overhead"] >= 1
    # The tokens of a group, bfloat16, to each of its devices: in every layer, forward and backward.
    tokens = 3 * 64 * 32 * 2
    assert found["received"]["all-gather"] > 2 * 3 * 2 * tokens
    between = {kind for kind in found["received"] if kind.endswith("between slices")}
    assert between == ({"all-reduce between slices"} if slices > 1 else set())
    roofline = found["roofline"]
    assert 0 < roofline["overlapped"] < roofline["serial"] < 1e-3


@pytest.mark.slow
def test_a_gpu_updates_masters_and_moments_in_place(make_config, tmp_path) -> None:
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13)):
        pytest.skip("JAX's CUDA compiler is not installed: pip install 'esft-jax[cuda]'")
    path, output = tmp_path / "run.yaml", tmp_path / "plan.json"
    config = make_config(
        expert_cfg=None,
        mesh={},
        data={"train": ("none",), "sequence_length": 8},
        train={"batch_size": 1, "remat": "full"},
    )
    raw = json.loads((Path(config.model) / "config.json").read_text())
    raw["moe_intermediate_size"] = 512  # so that trained experts are nearly everything
    (tmp_path / "config.json").write_text(json.dumps(raw))
    save_config(dataclasses.replace(config, model=str(tmp_path)), path)
    command = [sys.executable, "-m", "esft_jax.plan", "--topology", "h100:1", "--json", output]
    command += ["--config", path, "--experts-per-layer", "8"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(output.read_text())
    memory = found["memory"]
    # Gradients, and the rest. A second state takes three times as much beside them.
    assert memory["tuned"] < memory["temporary"] < 3 * memory["tuned"]


@pytest.mark.parametrize(
    "gpu", ["rtx4090", *(pytest.param(n, marks=pytest.mark.slow) for n in GPUS if n != "rtx4090")]
)
def test_a_step_on_a_gpu(gpu, make_config, tmp_path) -> None:
    """Inputs of layers that are offloaded are the host's, and the rest fits what JAX takes."""
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13)):
        pytest.skip("JAX's CUDA compiler is not installed: pip install 'esft-jax[cuda]'")
    path, output = tmp_path / "run.yaml", tmp_path / "plan.json"
    save_config(make_config(train={"batch_size": 16, "remat": "offload"}), path)
    command = [sys.executable, "-m", "esft_jax.plan", "--topology", f"{gpu}:8", "--json", output]
    done = subprocess.run(
        [*command, "--config", path],
        env=os.environ | {"XLA_CLIENT_MEM_FRACTION": "0.5"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert f"0.50 of {GPUS[gpu].memory / 1e9:.2f} (XLA_CLIENT_MEM_FRACTION)" in done.stdout
    (found,) = json.loads(output.read_text())
    assert found["memory"]["available"] == GPUS[gpu].memory // 2
    # Two rows of a device, 64 tokens and 32 features in bfloat16, of the three layers from the
    # lowest tuned one.
    assert found["memory"]["host"] == 3 * 2 * 64 * 32 * 2
    assert found["roofline"]["network"] > 0


def test_a_model_that_no_gpu_of_24_gb_holds(tmp_path) -> None:
    if not any(importlib.util.find_spec(f"jax_cuda{cuda}_plugin") for cuda in (12, 13)):
        pytest.skip("JAX's CUDA compiler is not installed: pip install 'esft-jax[cuda]'")
    config, model = ROOT / "configs" / "olmoe-1b-7b.yaml", ROOT / "models" / "olmoe-1b-7b"
    command = [sys.executable, "-m", "esft_jax.plan", "--topology", "rtx4090:1", "--config", config]
    command += [f"model={model}", "mesh.expert=1", "method=full", "train.micro_batches=32"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "It does not fit" in done.stdout and "XLA_CLIENT_MEM_FRACTION=" not in done.stdout


CONFIGS = ROOT / "configs"


@pytest.mark.parametrize(
    "path",
    sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("pods/*.yaml")]),
    ids=lambda path: path.stem,
)
def test_shipped_configurations_fit_their_models(path) -> None:
    """On the slice that a configuration names, or else on as many devices as share the experts."""
    config = load_config(path)
    model = load_model_config(ROOT / "models" / Path(config.model).name)
    groups = 1
    if named := re.search(r"--topology (?:(\d+)x)?\w+:([\dx]+)\)", path.read_text()):
        devices = int(named[1] or 1) * math.prod(map(int, named[2].split("x")))
        groups, rest = divmod(devices, config.mesh.expert)
        assert rest == 0
    axes = (REPLICA, DATA, EXPERT)
    mesh = AbstractMesh((1, groups, config.mesh.expert), axes)
    check_fit(model, mesh, config)
    assert path.parent == CONFIGS or named


def test_a_hub_name_costs_no_weights(make_config, monkeypatch) -> None:
    asked = []

    def download(name: str, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        raise OSError("offline")

    monkeypatch.setattr("esft_jax.checkpoint.load.snapshot_download", download)
    with pytest.raises(InputError, match="offline"):
        open_case(make_config(model="owner/name"), "cpu:8")
    assert asked == [("owner/name", ["config.json"])]


@pytest.mark.slow
def test_a_transport_that_the_compiler_refuses_is_named(make_config, tmp_path) -> None:
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("the TPU compiler is not installed: pip install libtpu")
    path = tmp_path / "run.yaml"
    train = {"steps": 4, "batch_size": 64, "remat": "full"}
    save_config(
        make_config(mesh={"expert": 4, "transport": "ragged_all_to_all"}, train=train), path
    )
    command = [sys.executable, "-m", "esft_jax.plan", "--topology", "v5e:8x8", "--config", path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: mesh.transport: the compiler refuses")
