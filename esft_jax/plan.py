"""Compile the training step of a run for devices that need not be at hand: does it fit?

No weights, data or tokenizer are read. Exits with 0 if the step fits, with 1 if it does not.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence

import jax
from rich.table import Table

from esft_jax.accelerators import GPUS
from esft_jax.cli import Parser, add_config_arguments, command, named_config, option
from esft_jax.config import LoRAConfig, QuantiseConfig, RunConfig, load_config
from esft_jax.files import write_text_atomic
from esft_jax.planning.analysis import Plan, make_plan, open_case
from esft_jax.planning.collectives import within_slices
from esft_jax.planning.gpu_memory import FRACTION, memory_fraction
from esft_jax.planning.roofline import Roofline
from esft_jax.planning.suggest import suggestions
from esft_jax.terminal import Terminal
from esft_jax.topology import TOPOLOGIES, hardware
from esft_jax.values import Count, LocalPath


@command
def main(argv: Sequence[str]) -> int:
    """Run `python -m esft_jax.plan`; None stands for the command line."""
    parser = Parser(description=__doc__)
    add_config_arguments(parser, distributed=False)
    parser.add_argument(
        "--topology",
        required=True,
        help=TOPOLOGIES,
    )
    parser.add_argument(
        "--experts-per-layer",
        metavar="N",
        type=option(Count),
        help="experts to assume where none are chosen yet (default: a tenth of them)",
    )
    parser.add_argument("--compare", choices=["full"], help="add a column for full fine-tuning")
    parser.add_argument(
        "--json", metavar="FILE", type=option(LocalPath), help="write the figures, too"
    )
    args = parser.parse_args(argv)
    config = load_config(*named_config(args))
    # An accelerator that happens to be here is not asked, nor taken from those who use it.
    jax.config.update("jax_platforms", "cpu")
    case = open_case(config, args.topology, args.experts_per_layer)
    cases = [case]
    if args.compare:
        cases.append(open_case(_full(config), args.topology))
    console = Terminal()
    console.say(f"{config.model} on {args.topology}: {case.described}; compiling ...")
    plans = [make_plan(case) for case in cases]
    if args.json:
        write_text_atomic(args.json, json.dumps([plan.to_json() for plan in plans], indent=2))
    console.print(_table(plans))
    plan = plans[0]
    if plan.memory.fits:
        return 0
    console.say("It does not fit. What would help:")
    for text in suggestions(case, plan):
        console.say(f"- {text}")
    return 1


def _full(config: RunConfig) -> RunConfig:
    train = dataclasses.replace(config.train, verify_frozen=False)
    select = dataclasses.replace(config.select, also=())
    return dataclasses.replace(
        config,
        method="full",
        expert_cfg=None,
        select=select,
        lora=LoRAConfig(),
        train=train,
        quantise=QuantiseConfig(),
        frozen_memory="device",
    )


def _table(plans: Sequence[Plan]) -> Table:
    mesh = ", ".join(f"{axis} {size}" for axis, size in plans[0].mesh.items())
    table = Table(title=f"{plans[0].topology}, mesh: {mesh}; GB are 10^9 bytes")
    table.add_column("of one device")
    for plan in plans:
        table.add_column(plan.method, justify="right")
    rows = [_rows(plan) for plan in plans]
    for name in dict.fromkeys(name for each in rows for name in each):
        table.add_row(name, *(each.get(name, "") for each in rows))
        if name in ("fits", "operations by arithmetic, GFLOP per token", _NETWORK, _BETWEEN):
            table.add_section()
    return table


def _available(plan: Plan) -> str:
    gpu = GPUS.get(hardware(plan.topology))
    if gpu is None:
        return "available, GB"
    return f"available, GB: {memory_fraction():.2f} of {_gigabytes(gpu.memory)} ({FRACTION})"


_NETWORK = "received from other devices, GB per step"
_BETWEEN = "received from other slices, GB per step; not in the roofline"


def _rows(plan: Plan) -> dict[str, str]:
    memory = plan.memory
    needed = memory.needed
    left = None if needed is None or memory.available is None else memory.available - needed
    rows = {
        "frozen weights, GB": _gigabytes(memory.frozen),
        "tuned weights (masters), GB": _gigabytes(memory.tuned),
        "moments, GB": _gigabytes(memory.moments),
        "activations and other temporaries, GB": _gigabytes(memory.temporary),
        "needed, by the compiler, GB": _gigabytes(needed),
        _available(plan): _gigabytes(memory.available),
        "headroom, GB": _gigabytes(left),
        "in the memory of the host, GB": _gigabytes(memory.host),
        "fits": "yes" if memory.fits else "no",
        "tokens per step": f"{plan.tokens:,}",
    }
    if plan.operations is not None:
        rows["operations as compiled, GFLOP per token"] = f"{plan.operations / 1e9:.2f}"
    if plan.experts_overhead is not None:
        rows["operations of experts, over those without padding"] = f"{plan.experts_overhead:.3f}"
    rows["operations by arithmetic, GFLOP per token"] = f"{plan.model_operations / 1e9:.2f}"
    if plan.received is not None:
        rows |= {f"{kind}, GB": _gigabytes(size) for kind, size in sorted(plan.received.items())}
        within = sum(within_slices(plan.received).values())
        rows[_NETWORK] = _gigabytes(within)
        if len(within_slices(plan.received)) < len(plan.received):
            rows[_BETWEEN] = _gigabytes(sum(plan.received.values()) - within)
    if plan.roofline is not None:
        roofline = plan.roofline
        rows |= {
            "roofline: compute, s": f"{roofline.compute:.3f}",
            "roofline: weights and moments, s": f"{roofline.memory:.3f}",
            "roofline: network, s": f"{roofline.network:.3f}",
            **_from_host(plan, roofline),
            "roofline estimate of a step, at least, s": f"{roofline.overlapped:.3f}",
            "the same without any overlap, s": f"{roofline.serial:.3f}",
        }
    rows["tracing and compiling took, s"] = f"{plan.seconds:.0f}"
    return rows


def _from_host(plan: Plan, roofline: Roofline) -> dict[str, str]:
    if not plan.memory.frozen_on_host:
        return {}
    seconds = roofline.host
    return {"roofline: from the host, s": "unknown" if seconds is None else f"{seconds:.3f}"}


def _gigabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.2f}"


if __name__ == "__main__":
    sys.exit(main(None))
