"""What it costs to decode a batch whose rows have several adapters.

    python benchmarks/resident_adapters.py [--model models/tiny-moe] [--share 0.2]

Contenders are the base, the base with one adapter merged into it, and 1, 2, 4 and 8 adapters beside
it, dealt out to the rows of one batch. Adapters are made up: each has some experts of every layer,
other ones than the next, with other weights than the base's. Contenders take turns, round after
round; reported are medians of a token's time over rounds, and their ratio to one adapter beside the
base (the first of `--counts`). Prints Markdown, writes JSON.
"""

import argparse
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from measuring import alternate, machine, pin, print_table, write_report

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import apply_adapter, load_adapter, save_adapter, trained_names
from esft_jax.checkpoint.load import LoadedBase, load_base
from esft_jax.checkpoint.resident import attach_adapters
from esft_jax.decode.generation import generate_tokens


def make_adapter(base: LoadedBase, folder: Path, share: float, seed: int) -> Path:
    """An adapter of a share of each layer's experts."""
    config, rng = base.source.config, np.random.default_rng(seed)
    every = config.router.num_experts
    experts = ExpertConfig(
        {
            layer: tuple(rng.choice(every, max(1, round(share * every)), replace=False).tolist())
            for layer in config.moe_layers
        }
    )
    names = trained_names(config, experts, "")
    tensors = [(name, 1.1 * base.source.tensor(name).astype(np.float32)) for name in names]
    save_adapter(folder, tensors, experts, {"base_fingerprint": base.fingerprint})
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/tiny-moe")
    parser.add_argument("--share", type=float, default=0.2, help="of a layer's experts")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="new ones of each row")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("build/resident_adapters.json"))
    args = parser.parse_args(arguments)

    pin(args.threads)
    before = machine(args.threads)
    prompts = np.random.default_rng(0).integers(3, 1000, (args.rows, 16)).tolist()
    load = partial(load_base, args.model, jnp.dtype(args.dtype))

    def decode(base: LoadedBase, **options: Sequence[int]) -> Callable[[], object]:
        return partial(
            generate_tokens,
            base.model,
            prompts,
            stop_ids=[base.model.config.vocab_size],  # no token: all completions are as long
            max_new_tokens=args.tokens,
            batch_size=args.rows,
            **options,
        )

    with tempfile.TemporaryDirectory() as folder:
        base = load()
        adapters = [
            load_adapter(make_adapter(base, Path(folder) / str(i), args.share, i))
            for i in range(max(args.counts))
        ]
        contenders = {"base": decode(base)}
        merged = load()
        apply_adapter(merged.model, adapters[0], merged.fingerprint)
        contenders["one, merged"] = decode(merged)
        for count in args.counts:
            several = load()
            attach_adapters(several.model, adapters[:count], several.fingerprint)
            ids = [row % count for row in range(args.rows)]
            contenders[f"{count} beside the base"] = decode(several, adapter_ids=ids)
        seconds = alternate(contenders, args.rounds)
    times = {name: each / args.tokens for name, each in seconds.items()}
    one = times[f"{args.counts[0]} beside the base"]
    rows = [[name, f"{1e3 * time:.2f}", f"{time / one:.2f}"] for name, time in times.items()]
    print_table(["adapters"], ["ms per token", "ratio"], rows)
    report = {"before": before, "after": machine(args.threads), "seconds": seconds}
    report |= {"settings": {k: str(v) for k, v in vars(args).items()}, "per_token": times}
    write_report(args.output, report)


if __name__ == "__main__":
    main()
