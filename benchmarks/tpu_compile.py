"""A training step of DeepSeek-V2-Lite on chips that are not at hand: does it fit, what of?

    pip install libtpu
    python benchmarks/tpu_compile.py --experts expert_cfg.json

The step that `esft_jax.train` runs is compiled ahead of time, from shapes alone, by the compiler
that `libtpu` brings; it refuses what does not fit into a chip's memory. `--slices h100:1` compiles
for GPUs instead, with `pip install 'esft-jax[cuda]'`: bytes only, for the operations that kernels
are charged with are counted for those of TPUs. Methods:

- `esft`: the experts of `--experts`; float32 masters and moments, frozen weights in bfloat16.
- `full-bf16`, `full-fp32`: everything, with weights and moments in either type.
- `masked`: all experts are one trainable leaf, and a mask drops the updates of those not in
  `--experts`: what frameworks with fused experts offer. Weights and moments in bfloat16.

Every case is a process of its own. Prints Markdown, writes JSON.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental.pallas.tpu import get_tpu_info
from jax.extend.core import jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import Mesh
from measuring import machine, print_table, write_report

from esft_jax.config import OptimizerConfig
from esft_jax.experts.expert_config import ExpertConfig
from esft_jax.experts.partition import FROZEN, TUNED, attach_tuned_experts, partition
from esft_jax.mesh import EXPERT, batch_sharding, make_mesh, param_shardings
from esft_jax.model.config import ModelConfig
from esft_jax.model.remat import Remat
from esft_jax.model.transformer import Transformer
from esft_jax.ops.grouped_matmul.tpu_tiles import PIECES, plan_visits
from esft_jax.topology import ahead_of_time_devices, lowering_platform
from esft_jax.training.optimizer import make_optimizer
from esft_jax.training.state import TrainState, init_state, state_shardings
from esft_jax.training.step import jit_train_step, make_train_step

METHODS = ("esft", "full-bf16", "full-fp32", "masked")
SLICES = ("v5e:2x2", "v5e:2x4", "v5e:4x4", "v6e:2x2", "v6e:2x4", "v5p:2x2x1", "v5p:2x2x2")
CASE = ("slice", "method", "remat")
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Program:
    """A step, and all that goes into it as shapes with their places on the mesh."""

    step: Any
    state: TrainState
    frozen: nnx.State
    batch: dict[str, jax.ShapeDtypeStruct]


def abstract_program(
    config: ModelConfig,
    mesh: Mesh,
    method: str,
    experts: ExpertConfig,
    rows: int,
    length: int,
    remat: Remat,
) -> Program:
    """The step of a method; nothing is allocated."""
    chosen = experts if method == "esft" else None
    state_type = jnp.dtype(jnp.float32 if method in ("esft", "full-fp32") else jnp.bfloat16)
    optimizer = make_optimizer(OptimizerConfig(), steps=1)
    graph: Any = None

    def build() -> tuple[TrainState, nnx.State]:
        nonlocal graph
        model = Transformer(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16, mesh=mesh)
        if chosen is not None:
            attach_tuned_experts(model, chosen)
        if method == "masked":
            graph, tuned, frozen = nnx.split(model, lambda path, _: "experts" in path, ...)
        else:
            graph, tuned, frozen = partition(model, chosen)
        tuned = jax.tree.map(lambda p: p.astype(state_type), tuned)
        return init_state(optimizer, tuned, frozen), frozen

    if method == "masked":
        optimizer = _masked(optimizer, config, experts)
    state, frozen = jax.eval_shape(build)

    def place(tree: Any, shardings: Any) -> Any:
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
        )

    places = state_shardings(state, mesh)
    int32, sharding = jnp.dtype(jnp.int32), batch_sharding(mesh)
    types = dict.fromkeys(("tokens", "targets", "positions", "segment_ids"), int32)
    types["loss_weights"] = jnp.dtype(jnp.float32)
    return Program(
        jit_train_step(make_train_step(graph, optimizer, remat=remat), places),
        place(state, places),
        place(frozen, param_shardings(frozen, mesh)),
        {
            name: jax.ShapeDtypeStruct((rows, length), dtype, sharding=sharding)
            for name, dtype in types.items()
        },
    )


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


@dataclass
class Work:
    """Floating-point operations of one chip in a step, read from the traced program.

    XLA's own cost analysis counts the body of a loop once, and kernels not at all.

    Attributes:
        products: matrix products outside kernels, each as often as it runs.
        experts: the grouped kernels, by the rows and widths that their grids cover.
        experts_exact: the same without the padding of rows and widths to blocks.
        attention: the kernels of attention, by the blocks of scores that they compute.
    """

    products: float = 0.0
    experts: float = 0.0
    experts_exact: float = 0.0
    attention: float = 0.0

    @property
    def total(self) -> float:
        return self.products + self.experts + self.attention


@dataclass(frozen=True)
class Routing:
    """What the grouped kernels of one chip meet in one layer, for a balanced router.

    Attributes:
        sizes: rows of each expert of the chip.
        tuned: tuned experts per chip and layer, on average.
    """

    sizes: np.ndarray
    tuned: float

    def charged(self, tile: int) -> float:
        """Rows that are multiplied, pieces of tiles included, per row."""
        sizes = jnp.asarray(self.sizes, jnp.int32)
        begins, rows = jnp.cumsum(sizes) - sizes, int(self.sizes.sum())
        visits, count = plan_visits(begins, sizes, rows, tile // PIECES)
        return float(visits.pieces[: int(count)].sum()) * (tile // PIECES) / rows


def count_work(jaxpr: Any, routing: Routing, devices: int) -> Work:
    """Walk a traced program, without what nobody reads. Outside `shard_map` shapes are global and
    split over all devices. Pieces of assignments (`esft_jax.model.experts`) are one, as with a
    balanced router.
    """
    work = Work()

    def walk(jaxpr: Any, share: float, trips: int) -> None:
        used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
        for equation in used.eqns:
            name = equation.primitive.name
            if name == "dot_general":
                work.products += trips * share * _product_flops(equation)
            elif name == "pallas_call":
                _add_kernel(work, equation, routing, trips)
            else:
                inner_share = 1.0 if name == "shard_map" else share
                inner_trips = trips * (equation.params["length"] if name == "scan" else 1)
                for inner in jaxprs_in_params(equation.params):
                    walk(inner, inner_share, inner_trips)

    walk(jaxpr, 1 / devices, 1)
    return work


def _product_flops(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    depth = np.prod([equation.invars[0].aval.shape[i] for i in contracted])
    return 2.0 * np.prod(equation.outvars[0].aval.shape) * depth


def _add_kernel(work: Work, equation: Any, routing: Routing, trips: int) -> None:
    name = equation.params["name"]
    if name.startswith("splash"):
        work.attention += trips * _attention_flops(equation)
        return
    operands = equation.params["grid_mapping"].block_mappings
    arrays = [operand.array_aval.shape for operand in operands]
    blocks = [operand.transformed_block_aval.shape for operand in operands]
    charged = routing.charged(blocks[0][0])
    if name == "grouped_matmul":  # rows, banks, products
        rows = routing.sizes.sum()
        exact = arrays[0][1] * arrays[-1][1]
        covered = arrays[0][1] * _padded(arrays[-1][1], blocks[-1][1])
    else:  # rows, their gradients, gradients of the matrices
        rows = routing.sizes.mean() * routing.tuned
        exact = arrays[0][1] * arrays[1][1]
        covered = _padded(arrays[0][1], blocks[0][1]) * _padded(arrays[1][1], blocks[1][1])
    work.experts += trips * 2.0 * charged * rows * covered
    work.experts_exact += trips * 2.0 * rows * exact


def _attention_flops(equation: Any) -> float:
    """Of a splash attention kernel, which computes the blocks on and below the diagonal."""
    # Products in which a score, or its gradient, meets the width of queries and that of values.
    by_kind = {"_fwd_": (1, 1), "_dq_": (2, 1), "_dkv_": (2, 2)}
    of_query, of_value = next(n for kind, n in by_kind.items() if kind in equation.params["name"])
    operands = (v.aval for v in equation.invars)  # what says which blocks to visit comes first
    query, _, value = [a.shape for a in operands if jnp.issubdtype(a.dtype, jnp.floating)][:3]
    block = equation.params["grid_mapping"].block_mappings[0].transformed_block_aval.shape[0]
    blocks = query[-2] // block
    scores = np.prod(query[:-2]) * block**2 * blocks * (blocks + 1) / 2
    return 2.0 * scores * (of_query * query[-1] + of_value * value[-1])


def _padded(width: int, block: int) -> int:
    return -(-width // block) * block


def model_work(
    config: ModelConfig, method: str, experts: ExpertConfig, tokens: int, length: int
) -> float:
    """Operations of one chip in a step by arithmetic, nothing computed twice.

    Every layer runs forward; from the lowest trained one up, the gradients of the activations take
    as much again, and so do the gradients of weights that are trained. Attention is causal: half of
    all scores, whose gradients take twice as much.
    """
    full = method.startswith("full")
    size, heads, width = config.hidden_size, config.num_heads, config.qk_head_dim
    query = size * heads * width
    if config.q_lora_rank is not None:
        query = config.q_lora_rank * (size + heads * width)
    attention = query + size * (config.kv_lora_rank + config.qk_rope_head_dim)
    attention += heads * config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    attention += heads * config.v_head_dim * size
    scores = heads * (width + config.v_head_dim) * length / 2
    expert = 3 * size * config.expert_width
    shared = config.num_shared_experts * expert + size * config.router.num_experts
    total = size * config.vocab_size * (2.0 + full)
    first = {"esft": min(experts.experts), "masked": config.first_dense_layers}.get(method, 0)
    for layer in range(config.num_layers):
        passes = 1 + (layer >= first)
        total += attention * (passes + full) + scores * (3 if layer >= first else 1)
        if layer not in config.moe_layers:
            total += 3 * size * config.dense_width * (passes + full)
            continue
        chosen = len(experts.experts.get(layer, ())) / config.router.num_experts
        trained = chosen if method == "esft" else 1
        total += config.router.top_k * expert * (passes + trained) + shared * (passes + full)
    return 2 * tokens * total


def compile_case(
    options: argparse.Namespace, slice_name: str, method: str, remat: Remat
) -> dict[str, Any]:
    """Compile one method for one slice: bytes per chip, operations per chip and step, seconds."""
    config = ModelConfig.load(options.model)
    devices = ahead_of_time_devices(slice_name)
    mesh = make_mesh(expert=options.split or len(devices), devices=devices)
    experts = ExpertConfig.load(options.experts)
    program = abstract_program(
        config, mesh, method, experts, len(devices) * options.rows, options.length, remat
    )
    begin = time.perf_counter()
    traced = program.step.trace(program.state, program.frozen, program.batch)
    lowered = traced.lower(lowering_platforms=(lowering_platform(devices),))
    tracing = time.perf_counter() - begin
    size = {
        "frozen": _local_bytes(program.frozen),
        "tuned": _local_bytes(program.state.tuned),
        "moments": _local_bytes(program.state.opt_state),
    }
    case: dict[str, Any] = {"slice": slice_name, "method": method, "remat": remat}
    case |= {"chips": len(devices), "bytes": size, "tracing_seconds": tracing}

    if devices[0].platform == "tpu":
        case["operations"] = count_operations(options, config, method, experts, traced, mesh)
    size["available"] = _memory(mesh)
    if sum(size[name] for name in ("frozen", "tuned", "moments")) > size["available"]:
        return case | {"fits": False}  # without asking the compiler
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        short = re.search(r"required .*\(([\d.]+)G\) exceeds .* HBM \(([\d.]+)G\)", str(error))
        if short is None:
            raise
        size["needed"], size["available"] = (float(short[i]) * 2**30 for i in (1, 2))
        return case | {"fits": False}
    memory = compiled.memory_analysis()
    size["temporary"] = memory.temp_size_in_bytes
    size["needed"] = (
        memory.argument_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    # The compiler for GPUs refuses nothing.
    fits = size["needed"] <= size["available"]
    return case | {"fits": fits, "compile_seconds": time.perf_counter() - begin}


def count_operations(
    options: argparse.Namespace,
    config: ModelConfig,
    method: str,
    experts: ExpertConfig,
    traced: Any,
    mesh: Mesh,
) -> dict[str, float]:
    """Operations per chip and step: as traced, and by arithmetic."""
    shards, num_experts = mesh.shape[EXPERT], config.router.num_experts
    assignments = shards * options.rows * options.length * config.router.top_k
    drawn = np.random.default_rng(0).multinomial(assignments, np.full(num_experts, 1 / num_experts))
    trained = (
        num_experts if method != "esft" else experts.num_experts_selected / len(config.moe_layers)
    )
    routing = Routing(drawn[: num_experts // shards], trained / shards)
    work = count_work(traced.jaxpr.jaxpr, routing, mesh.size)
    tokens = options.rows * options.length
    return {
        "total": work.total,
        "model": model_work(config, method, experts, tokens, options.length),
        "experts": work.experts,
        "experts_exact": work.experts_exact,
    }


def _memory(mesh: Mesh) -> int:
    """Bytes of one device."""
    if mesh.devices.flat[0].platform == "gpu":
        return 80 * 2**30
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        chip = get_tpu_info()
    return chip.hbm_capacity_bytes * chip.num_cores


def _local_bytes(tree: Any) -> int:
    return sum(
        int(np.prod(x.sharding.shard_shape(x.shape))) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


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
        return f"{sum(size[n] for n in names) / 1e9:.2f}" if names[0] in size else ""

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
