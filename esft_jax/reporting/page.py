"""One HTML page that needs nothing beside it."""

from collections.abc import Sequence

import jinja2
import numpy as np

from esft_jax.reporting import analysis
from esft_jax.reporting.comparison import forgotten, verdict
from esft_jax.reporting.findings import SURE, Findings, answers, count_text, size_text
from esft_jax.reporting.tasks import Choice
from esft_jax.reporting.vocabulary import MIN_COUNT
from esft_jax.sweeping.table import MethodRow

_SHOWN = 20  # of a list, or of each of its ends; the CSV files have all


def render_page(
    findings: Findings, figures: dict[str, str], compared: Sequence[MethodRow] = ()
) -> str:
    """The page, with figures as `<svg>` elements inside.

    Args:
        figures: see `draw_figures` and `to_svg`.
        compared: see `read_comparison`.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("esft_jax.reporting", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count_text": count_text, "size_text": size_text}
    shown = [
        None if words is None else (words[:_SHOWN], words[_SHOWN:][-_SHOWN:])
        for words in findings.words
    ]
    return environment.get_template("page.html.j2").render(
        findings=findings,
        answers=[answers(findings, i) for i in range(len(findings.choices))],
        figures=figures,
        doubtful=[_doubtful(choice, findings.layers) for choice in findings.choices],
        effective=[_effective(choice, findings.top_k) for choice in findings.choices],
        words=shown,
        min_count=MIN_COUNT,
        sure=SURE,
        compared=compared,
        forgotten=forgotten(compared),
        verdict=verdict(compared) if compared else "",
    )


def _effective(choice: Choice, top_k: int) -> dict[str, float]:
    """Concentration of one task, mean over layers."""
    entropy, simpson = analysis.effective_experts(choice.shares)
    top = analysis.top_k_mass(choice.shares, top_k)
    return {"top": top.mean(), "entropy": entropy.mean(), "simpson": simpson.mean()}


def _doubtful(choice: Choice, layers: tuple[int, ...]) -> list[tuple[int, int, float]]:
    """Layer, expert and certainty of the chosen experts that are least sure, in this order."""
    if choice.certainty is None:
        return []
    cells = [
        (layers[row], int(expert), float(choice.certainty[row, expert]))
        for row, expert in zip(*np.nonzero(choice.chosen & (choice.certainty < SURE)), strict=True)
    ]
    return sorted(cells, key=lambda cell: cell[2])[:10]
