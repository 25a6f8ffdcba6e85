"""The tables of `docs/pods.md`: what the steps of shipped configurations are on their slices.

    pip install libtpu 'esft-jax[cuda]'
    python benchmarks/pod_plans.py [--tables fits] [--experts qwen3-30b-a3b=expert_cfg.json]

Runs `esft_jax.plan` for each case, one after the other. Prints Markdown; each plan is a line of the
record, by all that it depends on but the code: cases that have a line are not planned again, and
an interrupted call goes on where it was.

- `pods`: the configurations of `configs/pods`, on the slices that they name.
- `one`: models on one accelerator: frozen weights as they are and quantised, lean states.
- `fits`: models and methods against slices. The step of the model's configuration in `configs`, in
  micro-batches of one row per device, experts split over all devices.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import machine, print_table

from esft_jax.config import load_config
from esft_jax.planning.gpu_memory import FRACTION

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "plans.jsonl"
PODS = {
    "v5e-8": "v5e:2x4",
    "v5e-8x2": "2xv5e:2x4",
    "v5e-64": "v5e:8x8",
    "v5p-16": "v5p:2x2x2",
    "v6e-8": "v6e:2x4",
    "h100x8": "h100:8",
    "deepseek-v2-v5p-128": "v5p:4x4x4",
    "moonlight-16b-a3b-v5e-8": "v5e:2x4",
    "glm-4.7-flash-h100x8": "h100:8",
    "glm-4.5-air-h100x8": "h100:8",
    "qwen3-30b-a3b-h100x8": "h100:8",
    "olmoe-1b-7b-h100x1": "h100:1",
    "mixtral-8x7b-h100x8": "h100:8",
    "gemma-4-26b-a4b-v6e-4": "v6e:2x2",
    "qwen3.6-35b-a3b-h100x8": "h100:8",
    "qwen3-next-80b-a3b-h100x8": "h100:8",
    "gpt-oss-20b-v6e-4": "v6e:2x2",
}
TRANSPORTS = ("all_gather", "ragged_all_to_all")  # of `mesh.transport`
# Models of `fits`, with the experts per layer that are assumed; None is a tenth of them.
MODELS = {
    # As token score and p = 0.2 chose them for a public configuration: 191 of 6144.
    "qwen3-30b-a3b": 4,
    "glm-4.7-flash": None,
    "moonlight-16b-a3b": None,
    "olmoe-1b-7b": None,
    "qwen3.6-35b-a3b": None,
    "gpt-oss-20b": None,
    "gemma-4-26b-a4b": None,
}
METHODS = ("esft", "full")
# And their devices.
SLICES = {"v5e:2x4": 8, "v6e:2x2": 4, "v6e:2x4": 8, "h100:1": 1, "h100:2": 2, "h100:8": 8}
# Models of `one`: a scheme for their experts, and single accelerators.
ONE = {
    "qwen3-30b-a3b": ("int4", ("rtx4090:1", "rtx5090:1", "v6e:1x1")),
    "gpt-oss-20b": ("mxfp4", ("rtx4090:1",)),
    "deepseek-v2-lite": ("int4", ("v5e:1x1", "rtx4090:1")),
    "glm-4.5-air": ("int4", ("h200:1",)),
}
# What is set of them.
LEAN = ("optimizer.moments=bfloat16", "optimizer.masters=bfloat16")
WAYS = {
    "full": ("method=full",),
    "esft": (),
    "esft, experts on the host": ("frozen_memory=host",),
    "esft, {scheme}": ("quantise.experts={scheme}", "quantise.rest=int8"),
    "esft, {scheme}, lean AdamW": ("quantise.experts={scheme}", "quantise.rest=int8", *LEAN),
    "esft, {scheme}, lean Adafactor": (
        "quantise.experts={scheme}",
        "quantise.rest=int8",
        "optimizer.name=adafactor",
        "optimizer.beta1=null",
        "optimizer.beta2=null",
        "optimizer.epsilon=null",
        *LEAN,
    ),
}
GPU_SHARE = "0.96"  # of a GPU's memory, for JAX to take
KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclass(frozen=True)
class Case:
    """A plan to make.

    Attributes:
        name: of the configuration, below `configs`.
        overrides: of its keys.
        per_layer: experts to assume in each layer; None is `plan`'s default.
    """

    name: str
    topology: str
    overrides: tuple[str, ...]
    per_layer: int | None = None

    @property
    def path(self) -> Path:
        return ROOT / "configs" / f"{self.name}.yaml"

    @property
    def model(self) -> Path:
        """A configuration names a checkpoint; a plan needs only the model's `config.json`."""
        return ROOT / "models" / Path(load_config(self.path).model).name

    @property
    def key(self) -> str:
        """Of what the plan depends on, but for the code: a hash."""
        config = load_config(self.path, self.overrides)
        values = _set(config)
        for name in ("model", "output", "expert_cfg", "score", "evaluation"):
            values.pop(name, None)
        values["data"] = config.data.sequence_length
        files = [self.model / "config.json", *filter(None, [config.expert_cfg])]
        contents = [json.loads(Path(file).read_text()) for file in files]
        parts = [values, contents, self.topology, self.per_layer]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _set(section: Any) -> dict[str, Any]:
    """What of a configuration is not as by default: keys that come later change no hash."""
    found = {}
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        made = field.default_factory is not dataclasses.MISSING
        if value != (field.default_factory() if made else field.default):
            found[field.name] = _set(value) if dataclasses.is_dataclass(value) else value
    return found


def pod_cases(names: Sequence[str], transports: Sequence[str]) -> Iterator[Case]:
    """Configurations of `configs/pods`."""
    for name, transport in itertools.product(names, transports):
        yield Case(f"pods/{name}", PODS[name], (f"mesh.transport={transport}",))


def fit_cases(
    models: Sequence[str],
    methods: Sequence[str],
    slices: Sequence[str],
    experts: dict[str, Path],
) -> Iterator[Case]:
    """Models and methods on slices.

    Args:
        experts: by model, an `expert_cfg.json` of what ESFT trains, instead of what is assumed.
    """
    for model, method, topology in itertools.product(models, methods, slices):
        devices = SLICES[topology]
        rows = load_config(ROOT / "configs" / f"{model}.yaml").train.batch_size
        overrides = [f"method={method}", f"mesh.expert={devices}"]
        overrides += [f"train.micro_batches={rows // devices}"]
        given = method == "esft" and model in experts
        if given:
            overrides.append(f"expert_cfg={experts[model]}")
        per_layer = None if given or method == "full" else MODELS[model]
        yield Case(model, topology, tuple(overrides), per_layer)


def one_cases(models: Sequence[str], experts: dict[str, Path]) -> Iterator[tuple[Case, str]]:
    """Models on one accelerator, with one row per update, and how.

    Args:
        experts: see `fit_cases`.
    """
    for model in models:
        scheme, topologies = ONE[model]
        for topology, (way, settings) in itertools.product(topologies, WAYS.items()):
            overrides = ["mesh.expert=1", "train.batch_size=1", "train.micro_batches=1"]
            overrides += [setting.format(scheme=scheme) for setting in settings]
            given = way != "full" and model in experts
            overrides += [f"expert_cfg={experts[model]}"] if given else []
            per_layer = None if given or way == "full" else MODELS.get(model)
            yield Case(model, topology, tuple(overrides), per_layer), way.format(scheme=scheme)


def make_plan(case: Case) -> dict[str, Any] | None:
    """The plan of a case, by the command; None if its transport cannot be compiled."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "esft_jax.plan", "--topology", case.topology]
        command += ["--json", str(output), "--config", str(case.path)]
        if case.per_layer is not None:
            command += ["--experts-per-layer", str(case.per_layer)]
        command += [f"model={case.model}", *case.overrides]
        environment = os.environ | {FRACTION: GPU_SHARE}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == 2 and "error: mesh.transport" in done.stderr:
            return None
        if done.returncode not in (0, 1):  # it fits, or it does not
            raise SystemExit(f"{case}: {done.stderr[-2000:]}")
        (plan,) = json.loads(output.read_text())
        return plan


def read_record(path: Path) -> dict[str, dict[str, Any] | None]:
    """Plans by key; None where the compiler refused."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["key"]: entry["plan"] for entry in map(json.loads, lines)}


def make_plans(cases: Sequence[Case], record: Path) -> dict[Case, dict[str, Any] | None]:
    """Plans from the record, and of those that it lacks, which are added to it."""
    known = read_record(record)
    for case in cases:
        if case.key in known:
            continue
        print(f"{case.name} on {case.topology}: {' '.join(case.overrides)}", file=sys.stderr)
        plan = known[case.key] = make_plan(case)
        entry = {"key": case.key, "case": case.name, "machine": machine(os.cpu_count() or 1)}
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("a") as file:
            file.write(json.dumps(entry | {"plan": plan}) + "\n")
    return {case: known[case.key] for case in cases}


def row(name: str, plan: dict[str, Any]) -> list[str]:
    """What the table of pods says of a plan."""
    memory, devices = plan["memory"], math.prod(plan["mesh"].values())
    operations = [plan["operations"], plan["model_operations"]]
    words = [name, plan["topology"], str(devices), "yes" if plan["fits"] else "no"]
    sizes = [memory["frozen"], memory["tuned"] + memory["moments"], memory["temporary"]]
    sizes += [memory["needed"], memory["available"]]
    received: list[float | None] = [None] * (len(KINDS) + 1)
    if plan["received"]:
        received = [plan["received"].get(kind, 0) for kind in KINDS]
        received.append(sum(plan["received"].values()) - sum(received))
    roofline = plan["roofline"] or {"overlapped": None, "serial": None}
    return [
        *words,
        *(_number(size, 1e9) for size in sizes),
        *(_number(count, 1e9, 1) for count in operations),
        *(_number(size, 1e9, 1) for size in received),
        *(_number(roofline[name], 1) for name in ("overlapped", "serial")),
        f"{plan['seconds']:.0f}",
    ]


def _number(value: float | None, unit: float, digits: int = 2) -> str:
    return "" if value is None else f"{value / unit:.{digits}f}"


def report(plans: dict[str, dict[str, Any]]) -> None:
    """The table of pods."""
    print_table(
        ("configuration", "topology", "devices", "fits"),
        (
            "frozen GB",
            "tuned and moments GB",
            "temporaries GB",
            "needed GB",
            "available GB",
            "GFLOP per token",
            "of the model",
            *(f"{kind} GB" for kind in KINDS),
            "between slices GB",
            "roofline s",
            "without overlap s",
            "plan took s",
        ),
        [row(name, plan) for name, plan in plans.items()],
    )


def fit(plan: dict[str, Any]) -> str:
    """Gigabytes that a device needs, and whether it has them."""
    memory = plan["memory"]
    if memory["needed"] is None:  # the compiler was not asked
        state = memory["frozen"] + memory["tuned"] + memory["moments"]
        return f"no (over {state / 1e9:.1f})"
    needed = f"{memory['needed'] / 1e9:.1f}"
    return needed if plan["fits"] else f"no ({needed})"


def report_fits(plans: dict[Case, dict[str, Any]]) -> None:
    """The table of models against slices."""
    available, cells = dict[str, str](), dict[tuple[str, str, str], dict[str, str]]()
    for case, plan in plans.items():
        available[case.topology] = _number(plan["memory"]["available"], 1e9, 1)
        line = (case.name, plan["method"], plan["experts"])
        cells.setdefault(line, {})[case.topology] = fit(plan)
    print_table(
        ("model", "method", "trained"),
        [f"{name} ({size} GB)" for name, size in available.items()],
        [[*line, *(by.get(name, "") for name in available)] for line, by in cells.items()],
    )
    counted = [p["experts_overhead"] for p in plans.values() if p["experts_overhead"] is not None]
    if counted:
        print(f"\nOperations of experts over those without padding: at most {max(counted):.3f}")


def report_one(plans: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """The table of single accelerators.

    Args:
        plans: each with how the model is kept and trained.
    """
    rows = []
    for way, plan in plans:
        memory = plan["memory"]
        kinds = ("frozen", "tuned", "moments", "temporary", "available", "host")
        sizes = (memory[name] for name in kinds)
        rows.append([plan["topology"], way, *(_number(size, 1e9, 1) for size in sizes), fit(plan)])
    columns = ("frozen", "tuned", "moments", "temporaries", "available", "on the host")
    print_table(("one device", "how"), [*(f"{name} GB" for name in columns), "needed GB"], rows)


def _experts(text: str) -> tuple[str, Path]:
    model, _, path = text.partition("=")
    known = MODELS.keys() | ONE.keys()
    if model not in known or not path:
        raise argparse.ArgumentTypeError(f"{text!r}; expected MODEL=FILE, one of {sorted(known)}")
    return model, Path(path)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Plan shipped configurations on their slices.")
    tables = ("pods", "fits", "one")
    parser.add_argument("--tables", nargs="+", choices=tables, default=tables)
    parser.add_argument("--pods", nargs="+", choices=PODS, default=list(PODS))
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS[:1])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--slices", nargs="+", choices=SLICES, default=list(SLICES))
    parser.add_argument(
        "--experts",
        nargs="+",
        metavar="MODEL=FILE",
        type=_experts,
        default=[],
        help="what ESFT trains of a model of `fits` and `one`: an expert_cfg.json",
    )
    parser.add_argument("--record", type=Path, default=RECORD, help="plans that were made")
    options = parser.parse_args(arguments)
    if "pods" in options.tables:
        cases = list(pod_cases(options.pods, options.transports))
        named = dict[str, dict[str, Any]]()
        for case, plan in make_plans(cases, options.record).items():
            name, (option,) = Path(case.name).name, case.overrides
            transport = option.partition("=")[2]
            name = name if transport == TRANSPORTS[0] else f"{name}, {transport}"
            if plan is None:
                print(f"{name}: refused by the compiler")
            else:
                named[name] = plan
        report(named)
    if "one" in options.tables:
        for model in ONE:
            print(f"\n{model}\n")
            ways = dict(one_cases([model], dict(options.experts)))
            found = make_plans([*ways], options.record)
            report_one((ways[case], plan) for case, plan in found.items() if plan is not None)
    if "fits" in options.tables:
        chosen = options.models, options.methods, options.slices
        cases = list(fit_cases(*chosen, dict(options.experts)))
        plans = make_plans(cases, options.record)
        report_fits({case: plan for case, plan in plans.items() if plan is not None})


if __name__ == "__main__":
    main(sys.argv[1:])
