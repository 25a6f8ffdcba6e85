"""An accelerator in eight minutes: are its kernels right, and how fast is a training step?

    python benchmarks/accelerator.py

First `esft_jax.selfcheck`, of its two models. Then the steps of a few layers of each of them, of
full width, with random weights and a row of 4096 tokens: ESFT of a tenth of each layer's experts,
against full fine-tuning. MFU is by the operations that a method needs, nothing computed twice, of
the device's peak in bfloat16. Prints Markdown, writes JSON.

Every measurement is a process of its own, so that none is short of memory that another one holds.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measuring import in_new_process, machine, print_table, write_report

from esft_jax import selfcheck
from esft_jax.accelerators import peak_flops
from esft_jax.checking.small_step import small_model
from esft_jax.config import RunConfig
from esft_jax.families import load_model_config
from esft_jax.memory import out_of_memory
from esft_jax.model.config import ModelConfig
from esft_jax.planning.analysis import what_is_trained
from esft_jax.planning.program import run_parts, step_shapes
from esft_jax.sharding import make_mesh
from esft_jax.training.operations import model_operations
from esft_jax.training.optimizer import make_optimizer
from esft_jax.training.state import init_state

MODELS = ("deepseek-v2-lite", "qwen3-30b-a3b")
METHODS = ("esft", "full")
ROOT = Path(__file__).parents[1] / "models"


def lower_layers(model: ModelConfig, layers: int) -> ModelConfig:
    """A model of so many MoE layers, the lowest ones, and the dense ones below them."""
    last = model.moe_layers[min(layers, len(model.moe_layers)) - 1]
    kept = tuple(layer for layer in model.moe_layers if layer <= last)
    return dataclasses.replace(model, num_layers=last + 1, moe_layers=kept)


def measure(
    name: str, method: str, layers: int, length: int, steps: int, tiny: bool
) -> dict[str, Any]:
    """The step of a method on some layers of a model.

    Args:
        tiny: a small model with the same switches.
    """
    model = load_model_config(ROOT / name)
    model = small_model(model) if tiny else lower_layers(model, layers)
    data = {"train": ("none.jsonl",), "sequence_length": length}
    train = {"batch_size": 1, "remat": "full"}
    config = RunConfig(str(ROOT / name), "none", data, method=method, train=train)
    trained, described = what_is_trained(config, model)
    device = jax.devices()[0]
    mesh, optimizer = make_mesh(devices=[device]), make_optimizer(config.optimizer, steps)
    found = {
        "device": device.device_kind,
        "model": name,
        "layers": model.num_layers,
        "method": method,
        "trained": described,
        "tokens": length,
    }

    def parts() -> Any:
        return run_parts(model, mesh, trained, jnp.bfloat16)

    def begin() -> Any:
        _, tuned, frozen = parts()
        return init_state(optimizer, tuned, frozen), frozen

    try:
        shapes = step_shapes(mesh, optimizer, parts)
        start = time.perf_counter()
        compiled = shapes.trace(config.train, config.data).lower().compile()
        found["compile_seconds"] = time.perf_counter() - start
        places = jax.tree.map(lambda x: x.sharding, (shapes.state, shapes.frozen))
        state, frozen = jax.jit(begin, out_shardings=places)()
        seconds = []
        for index in range(1 + steps):
            batch = jax.device_put(_batch(model, length, index), device)
            start = time.perf_counter()
            state, metrics = compiled(state, frozen, batch)
            loss = float(metrics["loss"])
            seconds.append(time.perf_counter() - start)
    except Exception as error:
        failed = out_of_memory(error)
        if failed is None:
            raise
        return found | {"problem": str(failed)}
    assert np.isfinite(loss), f"{name}, {method}: the loss is {loss}"
    median = statistics.median(seconds[1:])
    peak = peak_flops(device.device_kind)
    flops = model_operations(model, trained, length) * length / median
    return found | {
        "step_seconds": median,
        "mfu": None if peak is None else flops / peak,
        "flops_per_second": flops,
        "peak_bytes": (device.memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _batch(model: ModelConfig, length: int, index: int) -> dict[str, np.ndarray]:
    """A row full of one document of random tokens, a loss on every one."""
    tokens = np.random.default_rng(index).integers(0, model.vocab_size, (1, length + 1))
    tokens = tokens.astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones((1, length), np.int32),
        "positions": np.arange(length, dtype=np.int32)[None],
        "loss_weights": np.ones((1, length), np.float32),
    }


def selfchecked(arguments: list[str]) -> int:
    """The exit code of `selfcheck`."""
    return selfcheck.main(arguments)


def print_steps(found: Sequence[dict[str, Any]]) -> None:
    """A row for each step."""

    def row(step: dict[str, Any]) -> list[str]:
        named = [step["device"], step["model"], str(step["layers"]), step["method"]]
        if "problem" in step:
            return [*named, "out of memory", "", "", "", ""]
        mfu, peak = step["mfu"], step["peak_bytes"]
        return [
            *named,
            f"{step['tokens'] / step['step_seconds']:.0f}",
            f"{step['step_seconds'] * 1e3:.1f}",
            f"{step['flops_per_second'] / 1e12:.1f}",
            "unknown" if mfu is None else f"{100 * mfu:.1f} %",
            "" if peak is None else f"{peak / 1e9:.1f}",
        ]

    print_table(
        ["device", "model", "layers", "method"],
        ["tokens/s", "ms/step", "TFLOP/s", "MFU", "peak GB"],
        map(row, found),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2, help="MoE layers of each model")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row")
    parser.add_argument("--steps", type=int, default=5, help="timed steps")
    parser.add_argument("--config", help="what `selfcheck` is given, in place of its own models")
    parser.add_argument("--tiny", action="store_true", help="small models, to test the script")
    parser.add_argument("--output", type=Path, default=Path("build/accelerator.json"))
    args = parser.parse_args(arguments)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    checks = args.output.with_name("selfcheck.json")
    given = ["--json", str(checks), *(["--config", args.config] if args.config else [])]
    code = in_new_process("accelerator", "selfchecked", arguments=given)
    steps = []
    for name in MODELS:
        for method in METHODS:
            step = in_new_process(
                "accelerator",
                "measure",
                name=name,
                method=method,
                layers=args.layers,
                length=args.length,
                steps=args.steps,
                tiny=args.tiny,
            )
            steps.append(step)
    print_steps(steps)
    report = {
        "machine": machine(os.cpu_count() or 1),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "selfcheck": json.loads(checks.read_text()),
        "steps": steps,
    }
    write_report(args.output, report)
    if code:
        raise SystemExit("selfcheck: something is wrong, see above")


if __name__ == "__main__":
    main()
