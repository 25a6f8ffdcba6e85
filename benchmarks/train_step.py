"""A training step against torch: tokens per second and peak memory, on a CPU.

    python benchmarks/train_step.py [--family qwen3_moe]

Methods: full fine-tuning, ESFT of 5, 10 and 25 % of the experts of every layer, and the forward
pass alone. Contenders: this package; torch with one module per expert; and the fused experts of
`transformers` (both in `step_torch.py`). All start from the same Hugging Face folder and see the
same batches, in float32, with the same AdamW; that they compute the same is checked by the losses
and gradient norms of the first steps.

Every measurement is a process of its own. They alternate, so that a disturbance of the machine
meets all contenders: for each round, for each method, one contender after the other. Reported is
the median over all steps of all rounds, and the median over rounds of the peak of resident memory
while steps run. Prints Markdown, writes JSON.
"""

import argparse
import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from measuring import Measured, in_new_process, machine, pin, print_table, write_report

from esft_jax.huge_pages import restart_with_huge_pages
from esft_jax.model.remat import Remat

OURS = "esft_jax"
TORCH = {"torch modules": "modules", "transformers grouped_mm": "grouped_mm"}
CONTENDERS = (OURS, *TORCH)
SHARES = (5, 10, 25)  # percent of the experts of a layer
METHODS = ("full", *(f"esft-{share}" for share in SHARES), "forward")

# The learning rate is low, since large updates of random weights would amplify rounding.
OPTIMIZER = {
    "learning_rate": 1e-4,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}
# Losses and gradient norms of the first steps may differ by this part of themselves. Sums in
# another order differ by 1e-6; one update that is wrong or missing, by more than this.
TOLERANCE = 1e-3
CHECKED_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a model, in what families have in common, and of a batch.

    Attributes:
        head: features of a head, of those that are not rotated in latent attention.
        rotated: those that are, there.
        key_heads: heads of keys and values in grouped-query attention.
        batch: rows, and tokens per row.
    """

    vocabulary: int
    hidden: int
    layers: int
    dense_width: int
    expert_width: int
    experts: int
    top_k: int
    heads: int
    key_heads: int
    head: int
    rotated: int
    latent: int
    init: float
    batch: tuple[int, int]


SIZES = {
    "small": Size(4096, 512, 8, 2048, 256, 64, 6, 8, 2, 64, 32, 128, 0.02, (4, 512)),
    # For a test of the benchmark itself; its figures mean nothing.
    "tiny": Size(64, 32, 3, 48, 16, 20, 3, 2, 1, 16, 8, 16, 0.1, (2, 32)),
}


def _common(size: Size) -> dict[str, Any]:
    return {
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_experts_per_tok": size.top_k,
        "initializer_range": size.init,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _deepseek_v2(size: Size) -> dict[str, Any]:
    """Latent attention, a dense first layer, two shared experts, gates as they are."""
    return _common(size) | {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "intermediate_size": size.dense_width,
        "moe_intermediate_size": size.expert_width,
        "first_k_dense_replace": 1,
        "n_shared_experts": 2,
        "n_routed_experts": size.experts,
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
        "num_key_value_heads": size.heads,
        "q_lora_rank": None,
        "kv_lora_rank": size.latent,
        "qk_nope_head_dim": size.head,
        "qk_rope_head_dim": size.rotated,
        "v_head_dim": size.head,
    }


def _qwen3_moe(size: Size) -> dict[str, Any]:
    """Grouped-query attention with a norm of each head, gates that add up to 1."""
    return _common(size) | {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "intermediate_size": size.dense_width,
        "moe_intermediate_size": size.expert_width,
        "num_experts": size.experts,
        "norm_topk_prob": True,
        "num_key_value_heads": size.key_heads,
        "head_dim": size.head,
    }


def _olmoe(size: Size) -> dict[str, Any]:
    """As many heads of keys as of queries, a norm of all of them, gates as they are."""
    return _common(size) | {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "intermediate_size": size.expert_width,
        "num_experts": size.experts,
        "norm_topk_prob": False,
        "num_key_value_heads": size.heads,
        "pad_token_id": None,  # token 1 by default, whose embedding torch would not train
    }


def _qwen3_5_moe_text(size: Size) -> dict[str, Any]:
    """Linear attention in three of four layers, half as many key heads as value heads."""
    return _common(size) | {
        "model_type": "qwen3_5_moe_text",
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "moe_intermediate_size": size.expert_width,
        "shared_expert_intermediate_size": size.expert_width,
        "num_experts": size.experts,
        "num_key_value_heads": size.key_heads,
        "head_dim": size.head,
        "linear_num_key_heads": size.heads // 2,
        "linear_num_value_heads": size.heads,
        "linear_key_head_dim": size.head,
        "linear_value_head_dim": size.head,
    }


# `config.json` of a model, by its `model_type`.
FAMILIES = {
    "deepseek_v2": _deepseek_v2,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "qwen3_5_moe_text": _qwen3_5_moe_text,
}

Results = dict[str, dict[str, list[Measured]]]  # by method and contender, one per round


def measure(folder: Path, contender: str, method: str, *, remat: str, **arguments: Any) -> Measured:
    """One contender's run of a method."""
    arguments |= {"folder": folder, "method": method, "optimizer_config": OPTIMIZER}
    if contender == OURS:
        return in_new_process("step_jax", "measure", remat=remat, **arguments)
    return in_new_process("step_torch", "measure", kind=TORCH[contender], **arguments)


def differences(results: Results) -> list[str]:
    """Where contenders did not compute the same: one line each."""
    found = []
    for method, by_contender in results.items():
        first = {name: runs[0] for name, runs in by_contender.items()}
        for (one, a), (other, b) in itertools.combinations(first.items(), 2):
            for what in ("losses", "grad_norms"):
                pairs = zip(getattr(a, what), getattr(b, what), strict=True)
                for step, (x, y) in enumerate(itertools.islice(pairs, CHECKED_STEPS)):
                    if not abs(x - y) <= TOLERANCE * abs(x):
                        found.append(f"{method}, step {step}, {what}: {one} {x}, {other} {y}")
    return found


def summary(results: Results, tokens: int) -> dict[str, dict[str, dict[str, float | None]]]:
    """Medians: tokens per second, seconds per step, peak memory."""

    def one(runs: list[Measured]) -> dict[str, float | None]:
        seconds = statistics.median(s for run in runs for s in run.seconds)
        return {
            "tokens_per_second": tokens / seconds,
            "step_seconds": seconds,
            "peak_bytes": statistics.median(run.peak_bytes for run in runs),
            "compiled_bytes": runs[0].compiled_bytes,
        }

    return {
        method: {name: one(runs) for name, runs in by_contender.items()}
        for method, by_contender in results.items()
    }


def bars(figures: dict[str, Any]) -> list[tuple[str, float, str]]:
    """The ratios that are aimed at: what, measured, aim. Those that were not measured are left out.

    About 10 % of the experts stand for ESFT.
    """
    esft, full = figures.get("esft-10", {}), figures.get("full", {})
    found = []
    for name, aim, method in (("ESFT", 1.5, esft), ("full", 1.2, full)):
        rivals = [row["tokens_per_second"] for key, row in method.items() if key != OURS]
        if OURS in method and rivals:
            ratio = method[OURS]["tokens_per_second"] / max(rivals)
            found.append((f"{name}: tokens/s over the best torch", ratio, f">= {aim}"))
    if OURS in esft and OURS in full:
        for what, key, aim in (("step time", "step_seconds", 0.72), ("peak", "peak_bytes", 0.5)):
            ratio = esft[OURS][key] / full[OURS][key]
            found.append((f"{what} of ESFT over full, {OURS}", ratio, f"<= {aim}"))
    return found


def print_figures(figures: dict[str, Any]) -> None:
    """The table, and the bars below it."""

    def row(method: str, name: str, values: dict[str, Any]) -> list[str]:
        compiled = values["compiled_bytes"]
        return [
            method,
            name,
            f"{values['tokens_per_second']:.0f}",
            f"{values['step_seconds']:.3f}",
            f"{values['peak_bytes'] / 2**20:.0f}",
            "" if compiled is None else f"{compiled / 2**20:.0f}",
        ]

    print_table(
        ["method", "contender"],
        ["tokens/s", "s/step", "peak MiB", "compiled MiB"],
        [row(method, name, by[name]) for method, by in figures.items() for name in by],
    )
    print()
    for what, ratio, aim in bars(figures):
        print(f"- {what}: {ratio:.2f} ({aim})")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, default="deepseek_v2")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1, help="steps that are not timed")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each process")
    parser.add_argument("--remat", choices=get_args(Remat), default="none")
    parser.add_argument("--output", type=Path, default=Path("build/train_step.json"))
    args = parser.parse_args(arguments)

    pin(args.threads)
    before = machine(args.threads)
    size = SIZES[args.size]
    config, batch = FAMILIES[args.family](size), size.batch
    results: Results = {method: {name: [] for name in args.contenders} for method in args.methods}
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        load = in_new_process(
            "step_jax",
            "prepare",
            folder=folder,
            config=config,
            batch=batch,
            count=args.warmup + args.steps,
            shares=SHARES,
        )
        turns = itertools.product(range(args.rounds), args.methods, args.contenders)
        for number, method, name in turns:
            measured = measure(
                folder,
                name,
                method,
                remat=args.remat,
                warmup=args.warmup,
                steps=args.steps,
                threads=args.threads,
            )
            results[method][name].append(measured)
            rate = batch[0] * batch[1] / statistics.median(measured.seconds)
            print(f"round {number + 1}: {method}, {name}: {rate:.0f} tokens/s", flush=True)

    figures = summary(results, batch[0] * batch[1])
    print()
    print_figures(figures)
    different = differences(results)
    report = {
        "before": before,
        "after": machine(args.threads),
        "arguments": {key: str(value) for key, value in vars(args).items()},
        "model": config,
        "batch": batch,
        "load_of_tuned_experts": load,
        "figures": figures,
        "bars": bars(figures),
        "differences": different,
        "runs": {
            method: {name: [dataclasses.asdict(run) for run in runs] for name, runs in by.items()}
            for method, by in results.items()
        },
    }
    write_report(args.output, report)
    if different:
        raise SystemExit("\n".join(["the contenders did not compute the same:", *different]))


if __name__ == "__main__":
    restart_with_huge_pages()
    main()
