"""The numbers behind the figures, as rows for CSV files."""

import csv
from collections.abc import Iterable, Sequence
from io import StringIO

import numpy as np

from esft_jax.reporting import analysis
from esft_jax.reporting.findings import Findings
from esft_jax.routing.scores import ROUTING_METHODS, SCORE_METHODS

Table = tuple[Sequence[str], Iterable[Sequence[object]]]  # a header, and its rows


def tables(findings: Findings) -> dict[str, Table]:
    """All tables that the findings give, by the name of their files."""
    found: dict[str, Table] = {
        "experts": _experts(findings),
        "layers": _layers(findings),
        "concentration": _concentration(findings),
        "threshold": _threshold(findings),
        "scores": _scores(findings),
    }
    if findings.overlap is not None:
        names = [c.task.name for c in findings.choices if c.halves is not None]
        rows = [
            (names[i], names[j], value, findings.chance)
            for (i, j), value in np.ndenumerate(findings.overlap)
        ]
        found["overlap"] = ("task", "other", "shared_top_k", "chance"), rows
    if any(choice.sizes for choice in findings.choices):
        found["sample-size"] = _sample_sizes(findings)
    if any(words is not None for words in findings.words):
        found["words"] = (
            ("task", "token", "text", "count", "tuned_experts_met"),
            [
                (choice.task.name, word.token, word.text, word.count, word.met)
                for choice, words in zip(findings.choices, findings.words, strict=True)
                for word in words or ()
            ],
        )
    return found


def to_csv(table: Table) -> str:
    """RFC 4180, floating-point numbers with six digits."""
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(table[0])
    writer.writerows(
        [f"{cell:.6g}" if isinstance(cell, float) else cell for cell in row] for row in table[1]
    )
    return buffer.getvalue()


def _experts(findings: Findings) -> Table:
    found = findings.methods
    methods = [m for m in SCORE_METHODS if m in ROUTING_METHODS or m in found]
    header = (
        "task",
        "layer",
        "expert",
        *(f"{method}_score" for method in methods),
        "chosen",
        "certainty",
    )
    rows = []
    for choice in findings.choices:
        for (row, expert), chosen in np.ndenumerate(choice.chosen):
            scores, certainty = choice.task.scores, choice.certainty
            rows.append(
                (
                    choice.task.name,
                    findings.layers[row],
                    expert,
                    *(
                        float(scores.of(method)[row, expert]) if method in scores.methods else ""
                        for method in methods
                    ),
                    int(chosen),
                    "" if certainty is None else float(certainty[row, expert]),
                )
            )
    return header, rows


def _layers(findings: Findings) -> Table:
    header = (
        "task",
        "layer",
        "experts",
        "assignments_served",
        "gate_mass" if findings.gate_method == "gate" else "gate_share",
        "tokens_served",
        f"top_{findings.top_k}_gate_mass",
        "effective_experts_entropy",
        "effective_experts_simpson",
    )
    rows = []
    for choice in findings.choices:
        columns = (
            choice.counts,
            choice.served,
            choice.gate,
            [""] * len(findings.layers) if choice.met is None else choice.met,
            analysis.top_k_mass(choice.shares, findings.top_k),
            *analysis.effective_experts(choice.shares),
        )
        for layer, *cells in zip(findings.layers, *columns, strict=True):
            rows.append((choice.task.name, layer, *cells))
    return header, rows


def _concentration(findings: Findings) -> Table:
    rows = []
    for choice in findings.choices:
        ranked = -np.sort(-choice.shares, axis=1)
        for (row, rank), share in np.ndenumerate(ranked):
            cumulated = float(ranked[row, : rank + 1].sum())
            rows.append((choice.task.name, findings.layers[row], rank + 1, float(share), cumulated))
    return ("task", "layer", "rank", "share_of_gate_mass", "cumulated"), rows


def _threshold(findings: Findings) -> Table:
    header = (
        "task",
        "top_p",
        "experts",
        "share_of_experts",
        "assignments_served",
        "parameters",
        "adapter_bytes",
        "training_state_bytes",
        "operations_per_token",
    )
    rows = []
    for choice, thresholds in zip(findings.choices, findings.thresholds, strict=True):
        for at in thresholds:
            cells: tuple[object, ...] = ("", "", "", "")
            if at.cost is not None:
                cost = at.cost
                cells = (cost.parameters, cost.adapter_bytes, cost.state_bytes, cost.operations)
            rows.append((choice.task.name, at.top_p, at.count, at.share, at.served, *cells))
    return header, rows


def _scores(findings: Findings) -> Table:
    rows = [
        (choice.task.name, choice.selection.method, method, agreement)
        for choice in findings.choices
        for method, agreement in choice.agreements.items()
    ]
    return ("task", "chosen_by", "method", "agreement"), rows


def _sample_sizes(findings: Findings) -> Table:
    header = (
        "task",
        "tokens",
        *(f"{what}_{q}" for what in ("agreement", "shared_top_k") for q in ("p5", "p50", "p95")),
    )
    rows = [
        (choice.task.name, size.tokens, *size.agreement, *size.shared)
        for choice in findings.choices
        for size in choice.sizes
    ]
    return header, rows
