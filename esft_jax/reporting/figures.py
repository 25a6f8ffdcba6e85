"""Figures of a report: vector graphics that stay legible on a phone and in grey print."""

import re
from collections.abc import Sequence
from io import BytesIO, StringIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter

from esft_jax.reporting.comparison import forgotten
from esft_jax.reporting.findings import Findings
from esft_jax.routing.scores import score_words
from esft_jax.sweeping.table import MethodRow

_WIDTH = 5.6  # inches; a phone shows it at two thirds, which leaves 9 points legible
# Okabe and Ito: told apart by all kinds of colour vision, and with markers and dashes in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_BLUES = mpl.colormaps["Blues"].resampled(40)  # colour bars of more levels become pixels
_CHOSEN = "#D55E00"
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "text.parse_math": False,  # a task's name may have a "$"
    "svg.fonttype": "path",  # the same letters on every machine
    "figure.constrained_layout.use": True,
}


def draw_figures(findings: Findings, compared: Sequence[MethodRow] = ()) -> dict[str, Figure]:
    """All figures that the findings give, by the name of their files.

    Args:
        compared: see `read_comparison`.
    """
    with mpl.rc_context(_STYLE):
        figures = {f"experts-{i}": _experts(findings, i) for i in range(len(findings.choices))}
        figures["concentration"] = _concentration(findings)
        if findings.overlap is not None:
            figures["overlap"] = _overlap(findings)
        figures["layers"] = _layers(findings)
        if any(choice.sizes for choice in findings.choices):
            figures["sample-size"] = _sample_size(findings)
        figures["threshold"] = _threshold(findings)
        if forgotten(compared):
            figures["methods"] = _methods(compared)
        return figures


def to_svg(figure: Figure, name: str) -> str:
    """An `<svg>` element for the body of a page; ids start with the figure's name."""
    buffer = StringIO()
    with mpl.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", text)
    # Without a size of its own it takes the width of its place.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"',
        r"\1",
        re.sub(r'( height="[^"]*pt")', "", text, count=1),
        count=1,
    )


def to_png(figure: Figure) -> bytes:
    """The same as pixels."""
    buffer = BytesIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="png", dpi=200, metadata={"Software": None})
    return buffer.getvalue()


def _new(
    height: float, rows: int = 1, columns: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(_WIDTH, height))
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def _line(index: int) -> dict[str, Any]:
    return {
        "color": _COLOURS[index % len(_COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
    }


def _marked(index: int) -> dict[str, Any]:
    return _line(index) | {"marker": _MARKERS[index % len(_MARKERS)]}


def _experts(findings: Findings, index: int) -> Figure:
    """Every expert of every layer; the chosen ones are framed."""
    choice = findings.choices[index]
    scores = choice.scores
    times_even = scores / scores.mean(axis=1, keepdims=True)
    layers, experts = scores.shape
    figure, (axes,) = _new(0.9 + 0.125 * max(layers, 8))
    top = max(float(np.quantile(times_even, 0.995)), 2.0)
    x, y = np.arange(experts + 1) - 0.5, np.arange(layers + 1) - 0.5
    mesh = axes.pcolormesh(x, y, np.minimum(times_even, top), cmap=_BLUES, vmin=0, vmax=top)
    for row, expert in zip(*np.nonzero(choice.chosen), strict=True):
        frame = mpl.patches.Rectangle(
            (expert - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=_CHOSEN, linewidth=1.1
        )
        axes.add_patch(frame)
    axes.set(
        xlabel="expert", ylabel="layer", title=f"{choice.task.name}: chosen experts are framed"
    )
    _layer_ticks(axes.yaxis, findings.layers)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.invert_yaxis()
    axes.grid(False)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, aspect=30)
    bar.set_label("times the layer's mean" if layers > 10 else "times the mean")
    bar.outline.set_visible(False)
    return figure


def _layer_ticks(axis: mpl.axis.Axis, layers: tuple[int, ...]) -> None:
    step = -(-len(layers) // 13)
    axis.set_ticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])


def _concentration(findings: Findings) -> Figure:
    figure, (left, right) = _new(2.9, 1, 2)
    for i, choice in enumerate(findings.choices):
        ranked = -np.sort(-choice.shares, axis=1)
        ranks = np.arange(1, findings.num_experts + 1)
        left.plot(ranks, ranked.mean(axis=0), **_line(i))
        left.fill_between(
            ranks, ranked.min(axis=0), ranked.max(axis=0), color=_line(i)["color"], alpha=0.15, lw=0
        )
        right.plot(ranks, ranked.cumsum(axis=1).mean(axis=0), label=choice.task.name, **_line(i))
    even = 1 / findings.num_experts
    left.axhline(even, color="#555", lw=0.9, ls=":")
    left.set(
        title="Share of the gate mass", xlabel="rank of the expert in its layer", ylim=(0, None)
    )
    left.annotate("even", (findings.num_experts, even), ha="right", va="bottom", color="#444")
    left.set_xlim(1, findings.num_experts)
    right.plot([0, findings.num_experts], [0, 1], color="#555", lw=0.9, ls=":", label="even")
    right.axvline(findings.top_k, color="#999", lw=0.9)
    right.annotate(f" top {findings.top_k}", (findings.top_k, 0.01), color="#444")
    right.set(title="Cumulated", xlabel="best experts", xlim=(0, findings.num_experts), ylim=(0, 1))
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return figure


def _overlap(findings: Findings) -> Figure:
    assert findings.overlap is not None
    names = [choice.task.name for choice in findings.choices if choice.halves is not None]
    size = len(names)
    figure, (axes,) = _new(1.4 + 0.55 * size)
    x = np.arange(size + 1) - 0.5
    mesh = axes.pcolormesh(
        x, x, findings.overlap, cmap=_BLUES, vmin=0, vmax=findings.top_k, edgecolor="white"
    )
    for (row, column), value in np.ndenumerate(findings.overlap.tolist()):
        colour = "white" if value > 0.6 * findings.top_k else "black"
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(size), names, rotation=30 if size > 4 else 0)
    axes.set_yticks(range(size), names)
    axes.invert_yaxis()
    axes.grid(False)
    axes.set(
        title=f"Shared among the {findings.top_k} best experts (chance {findings.chance:.2f})",
        xlabel="one sample of",
        ylabel="another sample of",
    )
    figure.colorbar(mesh, ax=axes, pad=0.02).outline.set_visible(False)
    return figure


def _layers(findings: Findings) -> Figure:
    figure, panels = _new(0.6 + 1.3 * len(findings.choices), len(findings.choices), sharex=True)
    places = np.arange(len(findings.layers))
    top = max(max(int(c.counts.max()), c.even_count) for c in findings.choices)
    for i, (axes, choice) in enumerate(zip(panels, findings.choices, strict=True)):
        axes.bar(places, choice.counts, color=_line(i)["color"], width=0.75)
        for place, count in enumerate(choice.counts.tolist()):
            if len(places) <= 30:
                axes.text(place, count, str(count), ha="center", va="bottom", fontsize=7)
        axes.axhline(choice.even_count, color="#555", lw=0.9, ls=":")
        axes.set(ylabel="experts", title=choice.task.name, ylim=(0, 1.15 * top))
        axes.grid(axis="x", visible=False)
    panels[0].annotate(
        "needed if routing were even",
        (len(findings.layers) - 0.5, findings.choices[0].even_count),
        ha="right",
        va="top",
        color="#444",
    )
    _layer_ticks(panels[-1].xaxis, findings.layers)
    panels[-1].set_xlabel("layer")
    return figure


def _sample_size(findings: Findings) -> Figure:
    figure, (top, bottom) = _new(4.4, 2, sharex=True)
    for i, choice in enumerate(findings.choices):
        if not choice.sizes:
            continue
        x = [size.tokens for size in choice.sizes]
        for axes, field in ((top, "agreement"), (bottom, "shared")):
            low, middle, high = np.array([getattr(size, field) for size in choice.sizes]).T
            axes.plot(x, middle, label=choice.task.name, **_marked(i))
            axes.fill_between(x, low, high, color=_line(i)["color"], alpha=0.15, lw=0)
    top.axhline(findings.enough, color="#555", lw=0.9, ls=":")
    top.set(title="Chosen experts that two independent samples have in common", ylim=(None, 1))
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bottom.axhline(findings.chance, color="#555", lw=0.9, ls=":")
    bottom.annotate(
        "chance",
        (1, findings.chance),
        xycoords=("axes fraction", "data"),
        ha="right",
        va="bottom",
        color="#444",
    )
    bottom.set(
        title=f"Shared top {findings.top_k}, mean over layers", xlabel="tokens in each sample"
    )
    bottom.set_ylim(0, findings.top_k)
    bottom.set_xscale("log", base=2)
    bottom.xaxis.set_major_formatter(ScalarFormatter())
    bottom.legend(loc="center right")
    return figure


def _threshold(findings: Findings) -> Figure:
    has_costs = findings.costs is not None
    figure, panels = _new(4.4 if has_costs else 2.6, 1 + has_costs, sharex=True)
    for i, rows in enumerate(findings.thresholds):
        p = [row.top_p for row in rows]
        name = findings.choices[i].task.name
        panels[0].plot(p, [row.share for row in rows], label=name, **_line(i))
        if findings.costs is not None:
            full = findings.costs.full.operations
            operations = [row.cost.operations / full for row in rows if row.cost is not None]
            panels[1].plot(p, operations, **_line(i))
    thresholds = {c.selection.top_p for c in findings.choices if c.selection.top_p is not None}
    for axes in panels:
        for top_p in thresholds:
            axes.axvline(top_p, color="#999", lw=0.9)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylim(0, 1)
    panels[0].set_title("Routed experts that are trained")
    methods = sorted({c.selection.method for c in findings.choices})
    if "token" in methods:
        panels[0].plot([0, 1], [0, 1], color="#555", lw=0.9, ls=":", label="even routing")
    for top_p in thresholds:
        panels[0].annotate(f" p = {top_p:g}", (top_p, 0.93), color="#444")
    panels[0].legend(loc="lower right")
    if has_costs:
        panels[1].set_title("Operations per token, of full fine-tuning")
    panels[-1].set_xlabel(f"threshold p ({' or '.join(map(score_words, methods))})")
    return figure


def _methods(compared: Sequence[MethodRow]) -> Figure:
    """What is gained on the tasks, against what is lost elsewhere."""
    figure, (axes,) = _new(3.4)
    base, lost = compared[0], forgotten(compared)
    for i, row in enumerate([base, *(row for row in compared if row.method in lost)]):
        x, y = lost.get(row.method, 0.0), row.average
        across = row.retention.deviation if row.retention else 0.0
        look: dict[str, Any] = {
            "color": _COLOURS[i % len(_COLOURS)],
            "marker": _MARKERS[i % len(_MARKERS)],
        }
        axes.errorbar(x, y.mean, y.deviation, across, capsize=2, linewidth=1, **look)
        axes.annotate(row.method, (x, y.mean), (6, 4), textcoords="offset points")
    axes.set(
        title="Gained on the tasks, lost elsewhere",
        xlabel="held-out loss of what was not trained on, over the base's (nats per token)",
        ylabel="task metric, mean (%)",
    )
    axes.margins(x=0.12, y=0.12)
    return figure
