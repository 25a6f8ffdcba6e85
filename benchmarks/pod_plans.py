"""The table of `docs/pods.md`: what each configuration of `configs/pods` is on its slice.

    pip install libtpu 'esft-jax[cuda]'
    python benchmarks/pod_plans.py

Runs `esft_jax.plan` for each, one after the other. Prints Markdown, writes JSON.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import machine, print_table, write_report

from esft_jax.config import load_config

ROOT = Path(__file__).parents[1]
PODS = {
    "v5e-8": "v5e:2x4",
    "v5e-8x2": "2xv5e:2x4",
    "v5e-64": "v5e:8x8",
    "v5p-16": "v5p:2x2x2",
    "v6e-8": "v6e:2x4",
    "h100x8": "h100:8",
    "deepseek-v2-v5p-128": "v5p:4x4x4",
}
TRANSPORTS = ("all_gather", "ragged_all_to_all")  # of `mesh.transport`
KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


def make_plan(name: str, transport: str, output: Path) -> dict[str, Any] | None:
    """The plan of one configuration, by the command; None if its transport cannot be compiled."""
    config = ROOT / "configs" / "pods" / f"{name}.yaml"
    # The configuration names a checkpoint; a plan needs only the model's `config.json`.
    model = ROOT / "models" / Path(load_config(config).model).name
    command = [sys.executable, "-m", "esft_jax.plan", "--topology", PODS[name], "--json", output]
    command += ["--config", config, f"model={model}"]
    command += [f"mesh.transport={transport}"]
    output.unlink(missing_ok=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2 and "error: mesh.transport" in done.stderr:
        return None
    if done.returncode not in (0, 1):  # it fits, or it does not
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    (plan,) = json.loads(output.read_text())
    return plan


def row(name: str, plan: dict[str, Any]) -> list[str]:
    """What the table says of a plan."""
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


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Plan the configurations of configs/pods.")
    parser.add_argument("--pods", nargs="+", choices=PODS, default=list(PODS))
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS[:1])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "pod_plans.json")
    options = parser.parse_args(arguments)
    plans: dict[str, dict[str, Any]] = {}
    for name, transport in itertools.product(options.pods, options.transports):
        output = options.output.with_name(f"{name}.json")
        key = name if transport == TRANSPORTS[0] else f"{name}, {transport}"
        plan = make_plan(name, transport, output)
        if plan is None:
            print(f"{key}: refused by the compiler")
            continue
        plans[key] = plan
        write_report(options.output, {"machine": machine(os.cpu_count() or 1), "plans": plans})
    report(plans)


if __name__ == "__main__":
    main(sys.argv[1:])
