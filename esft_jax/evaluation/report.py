"""Scores beside each other: before and after training."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from esft_jax.evaluation.run import EvaluationReport, Score, adapter_sha256, short_hash
from esft_jax.files import read_json, write_text_atomic
from esft_jax.terminal import Terminal


@dataclass(frozen=True)
class Measure:
    """One figure of a task or domain.

    Attributes:
        name: of the task or domain.
        measure: what was measured, and its unit.
        before, after: its values; `before` is None where it is not known.
    """

    name: str
    measure: str
    before: float | None
    after: float

    @property
    def change(self) -> float | None:
        """`after` minus `before`."""
        return None if self.before is None else self.after - self.before


def measures(after: EvaluationReport, before: EvaluationReport | None = None) -> list[Measure]:
    """Every figure of a report, beside that of an earlier one."""
    found = []
    for name, score in after.scores.items():
        old = dict(_figures(before.scores[name])) if before is not None else {}
        for measure, value in _figures(score):
            found.append(Measure(name, measure, old.get(measure), value))
    return found


def _figures(score: Score) -> Iterator[tuple[str, float]]:
    if score.value is not None:
        yield f"{score.metric}, %", score.value
    if score.heldout is not None:
        yield "held-out loss, nats per token", score.heldout.nats_per_token
        if score.heldout.bits_per_byte is not None:
            yield "held-out bits per byte", score.heldout.bits_per_byte


def print_measures(
    console: Terminal,
    after: EvaluationReport,
    before: EvaluationReport | None = None,
    full: EvaluationReport | None = None,
) -> None:
    """Print a table of all figures, and what a judge left out.

    Args:
        full: of the same adapter on the base in full precision; the others are then of the
            quantised base.
    """
    table = Table("", "")
    headings = ("value",) if before is None else ("before", "after", "change")
    for heading in headings if full is None else (*headings, "in full precision"):
        table.add_column(heading, justify="right")
    exact = {} if full is None else {(m.name, m.measure): m.after for m in measures(full)}
    for found in measures(after, before):
        digits = 1 if found.measure.endswith("%") else 4
        cells = [f"{found.after:.{digits}f}"]
        if found.before is not None and found.change is not None:
            cells = [f"{found.before:.{digits}f}", *cells, f"{found.change:+.{digits}f}"]
        if full is not None:
            cells.append(f"{exact[found.name, found.measure]:.{digits}f}")
        table.add_row(found.name, found.measure, *cells)
    console.print(table)
    for report in filter(None, (before, after, full)):
        for name, score in report.scores.items():
            if score.failures:
                console.say(
                    f"{name} ({report.folder.name}): no readable score for {score.failures} of "
                    f"{score.rows} completions; they do not count"
                )


def write_comparison(after: EvaluationReport, before: EvaluationReport) -> Path:
    """Write all figures before and after, and their change, as JSON beside what they are of.

    Returns:
        the file, `comparison-HASH.json`. As for scores, the hash is of all that it depends on.
    """
    names = {name: folder.name for name, folder in after.folders.items()}
    sides = {"before": before.folder.name, "after": after.folder.name}
    path = after.folder.parent / f"comparison-{short_hash([sides, names])}.json"
    rows = [
        dataclasses.asdict(found) | {"change": found.change} for found in measures(after, before)
    ]
    content = sides | {"folders": names, "measures": rows}
    write_text_atomic(path, json.dumps(content, indent=2) + "\n")
    return path


def figures_of(adapter: Path) -> list[dict[str, Any]]:
    """What evaluations of these very tensors found, in the folder of their run."""
    found: list[dict[str, Any]] = []
    for path in sorted((adapter.parent / "evaluation").glob("comparison-*.json")):
        comparison = read_json(path)
        scores = sorted((path.parent / comparison["after"]).glob("*/scores.json"))
        if scores and read_json(scores[0]).get("adapter_sha256") == adapter_sha256(adapter):
            found += comparison["measures"]
    return found
