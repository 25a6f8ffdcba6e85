"""Draw docs/overview.svg, the picture of the README, from what was recorded.

    python benchmarks/picture.py

Left: the token scores of the quickstart's task, as `esft score configs/quickstart.yaml` writes them
(benchmarks/records/routing/intent.csv), and the experts that its `top_p` selects. Right: methods of
configs/paper/main.yaml, the means of docs/results.md.
"""

import csv
import xml.etree.ElementTree as xml
from pathlib import Path

import numpy as np
from paper import lines_of

from esft_jax.config import load_config
from esft_jax.reporting.comparison import forgotten
from esft_jax.routing.scores import ExpertScores
from esft_jax.routing.select import select_experts

PICTURE = Path("docs/overview.svg")
SCORES = Path("benchmarks/records/routing/intent.csv")
CONFIG = Path("configs/quickstart.yaml")
METHODS = {"full": "full", "lora": "LoRA", "token": "ESFT"}  # of the sweep, as they are shown
WIDTH, HEIGHT, MARGIN = 880, 346, 24
CELL, ROW = 14, 34  # of an expert
RIGHT, BAR = 560, 150  # where the comparison begins, and its longest bar
# The background is the picture's own: a page may have another theme than the system.
STYLE = """
svg { --paper: #ffffff; --ink: #1f2328; --faint: #59636e; --blue: #0969da; --orange: #bc4c00;
  font-family: system-ui, -apple-system, "Segoe UI", sans-serif; font-size: 13px; }
@media (prefers-color-scheme: dark) {
  svg { --paper: #151b23; --ink: #f0f6fc; --faint: #9198a1; --blue: #58a6ff; --orange: #f0883e; }
}
.paper { fill: var(--paper); stroke: var(--faint); stroke-opacity: 0.3; }
text { fill: var(--ink); }
.title { font-size: 16px; font-weight: 600; }
.faint { fill: var(--faint); }
.cell { fill: var(--blue); }
.chosen { fill: none; stroke: var(--orange); stroke-width: 2; }
.bar { fill: var(--faint); fill-opacity: 0.55; }
.ours { fill: var(--orange); }
"""


class Picture:
    """Shapes on one background."""

    def __init__(self) -> None:
        size = {"width": str(WIDTH), "height": str(HEIGHT), "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
        self.root = xml.Element(
            "svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", **size}
        )
        xml.SubElement(self.root, "title").text = "Which experts a task needs, and what it costs"
        xml.SubElement(self.root, "style").text = STYLE
        self.box("paper", 0.5, 0.5, WIDTH - 1, HEIGHT - 1, rx="10")

    def box(self, kind: str, x: float, y: float, width: float, height: float, **more: str) -> None:
        """A rectangle."""
        place = {"x": x, "y": y, "width": width, "height": height}
        shape = {name: f"{value:g}" for name, value in place.items()}
        xml.SubElement(self.root, "rect", {"class": kind, **shape, **more})

    def text(self, kind: str, x: float, y: float, text: str, anchor: str = "start") -> None:
        """One line; `y` is its base."""
        place = {"class": kind, "x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor}
        xml.SubElement(self.root, "text", place).text = text


def draw_experts(picture: Picture) -> None:
    """A cell for each expert, the darker the more of the task's tokens it gets."""
    with SCORES.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    layers = tuple(sorted({int(row["layer"]) for row in rows}))
    scores = np.array([float(row["token_score"]) for row in rows]).reshape(len(layers), -1)
    select = load_config(CONFIG).select
    measured = ExpertScores(layers, scores, gate=scores)
    chosen = select_experts(measured, method="token", top_p=select.top_p).experts
    left, top = MARGIN + 56, 82
    picture.text("title", MARGIN, 38, "Only the experts that a task uses are trained")
    picture.text("faint", MARGIN, 62, "tiny-moe on the quickstart's task: a row for each layer")
    for row, layer in enumerate(layers):
        y = top + row * ROW
        picture.text("faint", MARGIN, y + 19, f"layer {layer}")
        for expert, share in enumerate(scores[row]):
            strength = f"{0.06 + 0.94 * share / scores.max():.3f}"
            cell = (left + expert * CELL, y, CELL - 2, ROW - 4)
            picture.box("cell", *cell, **{"rx": "2", "fill-opacity": strength})
        for expert in chosen[layer]:
            picture.box("chosen", left + expert * CELL - 1, y - 1, CELL, ROW - 2, rx="3")
    count = sum(map(len, chosen.values()))
    served = np.mean([scores[row, list(chosen[layer])].sum() for row, layer in enumerate(layers)])
    y = top + len(layers) * ROW + 22
    picture.text("", MARGIN, y, f"{count} of {scores.size} experts, framed, are trained.")
    picture.text("", MARGIN, y + 20, f"They serve {served:.0%} of the task's routed tokens.")
    picture.text("faint", MARGIN, y + 42, "All other weights are frozen: no gradients, no moments.")


def draw_methods(picture: Picture) -> None:
    """Bars for each method: what it costs, what it forgets, what it gains."""
    lines = lines_of("main")
    rows = {name: lines[name].row for name in METHODS}
    lost = forgotten([line.row for line in lines.values()])
    measures = {
        "memory of a step, MB": {n: (r.step_bytes or 0) / 1e6 for n, r in rows.items()},
        "stored for a task, MB": {n: r.stored_bytes / 1e6 for n, r in rows.items()},
        "forgotten elsewhere, nats": lost,
        "metric, mean of four tasks": {n: r.average.mean for n, r in rows.items()},
    }
    picture.text("title", RIGHT, 38, "What it costs, forgets and gains")
    y = 62
    for title, values in measures.items():
        picture.text("faint", RIGHT, y, title)
        for number, (name, label) in enumerate(METHODS.items()):
            value, base = values[name], y + 17 + 15 * number
            length = BAR * value / max(values[n] for n in METHODS)
            picture.text("", RIGHT + 34, base, label, "end")
            picture.box("ours" if name == "token" else "bar", RIGHT + 42, base - 10, length, 11)
            picture.text("", RIGHT + 48 + length, base, f"{value:.3g}")
        y += 71


def main() -> None:
    """Write the picture."""
    picture = Picture()
    draw_experts(picture)
    draw_methods(picture)
    xml.indent(picture.root)
    text = xml.tostring(picture.root, encoding="unicode") + "\n"
    PICTURE.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
