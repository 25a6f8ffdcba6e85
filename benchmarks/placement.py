"""How evenly devices are loaded, before and after experts are placed by their scores.

    python benchmarks/placement.py --scores SCORES --experts expert_cfg.json

Scores are whatever `esft_jax.select` reads, such as the released routing logs of ESFT. Prints
Markdown: expected tokens of the busiest device in any layer, over the layer's mean.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from measuring import print_table

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.adapt.placement import expected_loads, place_experts
from esft_jax.routing.scores import load_scores


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scores", type=Path, required=True)
    parser.add_argument("--experts", type=Path, required=True)
    parser.add_argument("--devices", type=int, nargs="+", default=[2, 4, 8, 16])
    args = parser.parse_args(arguments)
    scores, experts = load_scores(args.scores), ExpertConfig.load(args.experts)
    experts.validate(scores.layers, scores.token.shape[1])
    selected = [tuple(sorted(experts.experts.get(layer, ()))) for layer in scores.layers]
    rows = []
    for devices in args.devices:
        placements = [
            place_experts(selected, scores.token.shape[1], devices, loads)
            for loads in (None, scores.token)
        ]
        busiest = [expected_loads(p, selected, devices, scores.token).max() for p in placements]
        owned = [sum(owners.count(d) for owners in placements[1].owners) for d in range(devices)]
        rows.append([str(devices), *(f"{x:.2f}" for x in busiest), f"{min(owned)}-{max(owned)}"])
    print_table(["devices"], ["in order", "placed", "tuned experts each"], rows)


if __name__ == "__main__":
    main()
