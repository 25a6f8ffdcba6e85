"""What the embedded model knows and how it routes: the tables of `models/tiny-moe/README.md`.

    python data/build_corpus.py
    python benchmarks/embedded_model.py

For each domain of the corpus, on its held-out split: bits per byte, beside `xz -9` on the same
bytes; how many experts per layer carry 20 % of the assignments (the token score's default p), where
uniform routing needs 7 of 32; the share of the four most used experts; and the overlap of those
four with the other domains. Prints Markdown, writes JSON.
"""

import argparse
import itertools
import json
import lzma
import platform
from pathlib import Path
from typing import Any

import numpy as np

import esft_jax
from esft_jax.data.pipeline import build_dataset, eval_batches
from esft_jax.evaluation.tasks import heldout_loss
from esft_jax.routing.scores import ExpertScores

# The model was pre-trained on rows of this length.
SEQUENCE_LENGTH = 256
BATCH_SIZE = 32
TOP = 4


def measure(model: Any, tokenizer: Any, path: Path) -> tuple[dict[str, float], ExpertScores]:
    """Figures of one domain's held-out file, and its expert scores."""
    dataset = build_dataset([str(path)], tokenizer, format="text", sequence_length=SEQUENCE_LENGTH)
    loss = heldout_loss(model, dataset, BATCH_SIZE)
    scores = esft_jax.score_experts(model, eval_batches(dataset, BATCH_SIZE))
    chosen = esft_jax.select_experts(scores, "token", 0.2)
    texts = "\n".join(json.loads(line)["text"] for line in path.open(encoding="utf-8"))
    raw = texts.encode()
    assert loss.bits_per_byte is not None
    descending = np.sort(scores.token, axis=1)[:, ::-1]
    figures = {
        "bytes": len(raw),
        "nats_per_token": loss.nats_per_token,
        "bits_per_byte": loss.bits_per_byte,
        "xz_bits_per_byte": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
        "experts_for_20_percent": chosen.num_experts_selected / len(scores.layers),
        "share_of_top_4": float(descending[:, :TOP].sum(axis=1).mean()),
        "max_to_mean_load": float((descending[:, 0] * scores.num_experts).mean()),
    }
    return figures, scores


def shared_top(one: ExpertScores, other: ExpertScores) -> float:
    """Mean number of experts, over layers, that are among the top 4 of both."""
    tops = [np.argsort(-scores.token, axis=1)[:, :TOP] for scores in (one, other)]
    pairs = zip(*tops, strict=True)
    return float(np.mean([len(set(a) & set(b)) for a, b in pairs]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="models/tiny-moe")
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--output", type=Path, default=Path("build/embedded_model.json"))
    args = parser.parse_args()

    model, tokenizer = esft_jax.load_model(args.model), esft_jax.Tokenizer.load(args.model)
    domains = {p.name.split(".")[0]: p for p in sorted(args.corpus.glob("*.valid.jsonl"))}
    assert domains, f"{args.corpus}: no *.valid.jsonl; run data/build_corpus.py first"
    results, scores = {}, {}
    for domain, path in domains.items():
        results[domain], scores[domain] = measure(model, tokenizer, path)

    print("| domain | bits per byte | `xz -9` | experts for 20 % | top-4 share | max / mean load |")
    print("|---|---|---|---|---|---|")
    for domain, row in results.items():
        print(
            f"| {domain} | {row['bits_per_byte']:.2f} | {row['xz_bits_per_byte']:.2f} "
            f"| {row['experts_for_20_percent']:.1f} | {row['share_of_top_4']:.0%} "
            f"| {row['max_to_mean_load']:.1f} |"
        )
    mixture = np.mean([s.token for s in scores.values()], axis=0) * scores[domain].num_experts
    overlap = np.mean(
        [shared_top(scores[a], scores[b]) for a, b in itertools.combinations(scores, 2)]
    )
    summary = {
        "mixture_max_to_mean_load": float(mixture.max(axis=1).mean()),
        "mixture_min_to_mean_load": float(mixture.min(axis=1).mean()),
        "mean_shared_top_4_between_domains": float(overlap),
        "chance_shared_top_4": TOP * TOP / scores[domain].num_experts,
    }
    print()
    for name, value in summary.items():
        print(f"- {name.replace('_', ' ')}: {value:.2f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "machine": f"{platform.system()} {platform.machine()}",
        "domains": results,
        "summary": summary,
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
