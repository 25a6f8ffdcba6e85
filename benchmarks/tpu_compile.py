"""A training step of DeepSeek-V2-Lite on chips that are not at hand: does it fit, what of?

    pip install libtpu
    python benchmarks/tpu_compile.py --experts expert_cfg.json

The step that `esft_jax.train` runs is compiled ahead of time, from shapes alone, by the compiler
that `libtpu` brings; it refuses what does not fit into a chip's memory. `--slices h100:1` compiles
for GPUs instead, with `pip install 'esft-jax[cuda]'`: bytes only, for the operations that kernels
are charged with are counted for those of TPUs. Methods:

- `esft`: the experts of `--experts`; float32 masters and moments, frozen weights in bfloat16.
- `full-bf16`, `full-fp32`: everything, with masters and moments in either type.
- `masked`: all experts are one trainable leaf, and a mask drops the updates of those not in
  `--experts`: what frameworks with fused experts offer. Masters and moments in bfloat16.

Every case is a process of its own. Prints Markdown, writes JSON.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from measuring import machine, print_table, write_report

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.partition import FROZEN, TUNED
from esft_jax.config import RunConfig
from esft_jax.families import load_model_config
from esft_jax.model.config import ModelConfig
from esft_jax.model.remat import Remat
from esft_jax.model.transformer import Transformer
from esft_jax.planning.operations import KernelRows, count_operations
from esft_jax.planning.program import StepShapes, compile_step, run_parts, step_shapes
from esft_jax.sharding import make_mesh
from esft_jax.topology import ahead_of_time_devices
from esft_jax.training.operations import model_operations
from esft_jax.training.optimizer import make_optimizer

METHODS = ("esft", "full-bf16", "full-fp32", "masked")
SLICES = ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v6e:2x2", "v6e:2x4", "v5p:2x2x1", "v5p:2x2x2")
CASE = ("slice", "method", "remat")
ROOT = Path(__file__).parents[1]


def method_config(method: str, model: Path, rows: int, length: int, remat: Remat) -> RunConfig:
    """The run whose step a method is; `rows` in all."""
    lean = method in ("full-bf16", "masked")
    return RunConfig(
        model=str(model),
        output="none",
        data={"train": ("none",), "sequence_length": length},
        method="full" if method.startswith("full") else "esft",
        train={"batch_size": rows, "remat": remat},
        optimizer={"moments": "bfloat16", "masters": "bfloat16"} if lean else {},
    )


def method_shapes(
    method: str, config: RunConfig, model: ModelConfig, mesh: Mesh, experts: ExpertConfig
) -> StepShapes:
    """What the step of a method is given."""
    chosen, given = experts if method == "esft" else None, config.optimizer

    def parts() -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
        if method != "masked":
            dtype = jnp.dtype(config.dtype)
            return run_parts(model, mesh, chosen, dtype, masters=jnp.dtype(given.masters))
        whole = Transformer(model, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, mesh=mesh)
        graph, tuned, frozen = nnx.split(whole, lambda path, _: "experts" in path, ...)
        return graph, tuned, frozen

    optimizer = make_optimizer(given, config.train.steps, mesh)
    if method == "masked":
        optimizer = _masked(optimizer, model, experts)
    return step_shapes(mesh, optimizer, parts, given.moments)


def trained_experts(method: str, model: ModelConfig, experts: ExpertConfig) -> ExpertConfig | None:
    """What has gradients; None for all."""
    if method == "masked":
        return ExpertConfig(dict.fromkeys(model.moe_layers, tuple(range(model.router.num_experts))))
    return experts if method == "esft" else None


def _masked(
    optimizer: optax.GradientTransformation, config: ModelConfig, experts: ExpertConfig
) -> optax.GradientTransformation:
    mask = np.zeros((len(config.moe_layers), config.router.num_experts), np.float32)
    for index, layer in enumerate(config.moe_layers):
        mask[index, list(experts.experts.get(layer, ()))] = 1

    def drop(updates: Any) -> Any:
        kept = jax.tree.map(
            lambda u: u * jnp.asarray(mask, u.dtype)[:, :, None, None], updates[TUNED]
        )
        return {TUNED: kept, FROZEN: updates[FROZEN]}

    return optax.chain(optimizer, optax.stateless(lambda updates, _: drop(updates)))


def compile_case(
    options: argparse.Namespace, slice_name: str, method: str, remat: Remat
) -> dict[str, Any]:
    """Compile one method for one slice: bytes per chip, operations per chip and step, seconds."""
    model, experts = load_model_config(options.model), ExpertConfig.load(options.experts)
    devices = ahead_of_time_devices(slice_name)
    mesh = make_mesh(expert=options.split or len(devices), devices=devices)
    rows = len(devices) * options.rows
    config = method_config(method, options.model, rows, options.length, remat)
    shapes = method_shapes(method, config, model, mesh, experts)
    case: dict[str, Any] = {"slice": slice_name, "method": method, "remat": remat}
    begin = time.perf_counter()
    traced = shapes.trace(config.train, config.data)
    case |= {"chips": len(devices), "tracing_seconds": time.perf_counter() - begin}
    if devices[0].platform == "tpu":
        trained = trained_experts(method, model, experts)
        tokens = options.rows * options.length
        kernels = KernelRows.balanced(model, mesh, trained, tokens)
        work = count_operations(traced.jaxpr.jaxpr, kernels, mesh.size)
        case["operations"] = {
            "total": work.total,
            "model": tokens * model_operations(model, trained, options.length),
            "experts": work.experts,
            "experts_exact": work.experts_exact,
        }
    begin = time.perf_counter()
    memory, text = compile_step(shapes, traced)
    if text is not None:
        case["compile_seconds"] = time.perf_counter() - begin
    return case | {"bytes": dataclasses.asdict(memory), "fits": memory.fits}


def run_cases(options: argparse.Namespace, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Each case in a process of its own: the compiler ends the process when it gives up."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    for case in itertools.product(options.slices, options.methods, options.remat):
        command = [sys.executable, __file__, *arguments, "--case", *case]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
            yield {**dict(zip(CASE, case, strict=True)), "error": done.stderr[-2000:]}
        else:
            yield json.loads(done.stdout.splitlines()[-1])


def report(cases: list[dict[str, Any]]) -> None:
    def gigabytes(case: dict[str, Any], *names: str) -> str:
        size = case["bytes"]
        return "" if size[names[0]] is None else f"{sum(size[n] for n in names) / 1e9:.2f}"

    rows = []
    for case in cases:
        if "error" in case:
            rows.append([*(case[name] for name in CASE), "failed", *[""] * 8])
            continue
        fits, operations = case["fits"], [""] * 3
        if work := case.get("operations"):
            operations = [
                f"{work['total'] / 1e12:.1f}",
                f"{work['model'] / 1e12:.1f}",
                f"{work['experts'] / work['experts_exact']:.3f}",
            ]
        rows.append(
            [
                *(case[name] for name in CASE),
                "yes" if fits else "no",
                gigabytes(case, "frozen"),
                gigabytes(case, "tuned", "moments"),
                gigabytes(case, "temporary"),
                gigabytes(case, "needed"),
                *operations,
                f"{case['compile_seconds']:.0f}" if "compile_seconds" in case else "",
            ]
        )
    print_table(
        (*CASE, "fits"),
        (
            "frozen GB",
            "tuned and moments GB",
            "temporaries GB",
            "needed GB",
            "TFLOP",
            "TFLOP of the model",
            "experts' work, of exact",
            "compile s",
        ),
        rows,
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description="Compile training steps for TPU slices.")
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "deepseek-v2-lite")
    parser.add_argument("--experts", type=Path, required=True, help="an expert_cfg.json")
    parser.add_argument("--slices", nargs="+", default=SLICES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--remat", nargs="+", choices=get_args(Remat), default=["full"])
    parser.add_argument("--length", type=int, default=4096, help="tokens per row")
    parser.add_argument("--split", type=int, help="chips that experts are split over; default all")
    parser.add_argument("--rows", type=int, default=1, help="rows per chip")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "tpu_compile.json")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.case:
        print(json.dumps(compile_case(options, *options.case)))
        return
    cases = []
    for case in run_cases(options, arguments):
        cases.append(case)
        write_report(options.output, {"machine": machine(os.cpu_count() or 1), "cases": cases})
    report(cases)


if __name__ == "__main__":
    main(sys.argv[1:])
