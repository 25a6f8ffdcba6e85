"""One HTML page that needs nothing beside it."""

from collections.abc import Sequence

import jinja2
import numpy as np

from esft_jax.reporting import analysis
from esft_jax.reporting.comparison import forgotten, verdict
from esft_jax.reporting.findings import SURE, Findings, answers, count_text, size_text
from esft_jax.reporting.tasks import Choice
from esft_jax.reporting.vocabulary import MIN_COUNT
from esft_jax.routing.scores import score_words
from esft_jax.selection_config import ScoreMethod
from esft_jax.sweeping.table import MethodRow

_DEFINITIONS: dict[ScoreMethod, str] = {
    "token": "The share of a layer's (token, expert) assignments that an expert serves.",
    "gate": "An expert's mean gate over all tokens, 0 where it was not chosen.",
    "gate_share": "An expert's mean share of a token's gates, over all tokens.",
    "contribution": "The mean norm of what an expert adds to the layer's output, by its share.",
    "contrast": "The token score over that of a general sample, smoothed by even routing, by its "
    "share.",
    "gate_taylor": "The mean size of a gate times the derivative of the loss by it, by its share: "
    "what the loss would change by without the expert, to first order.",
    "random": "Drawn by chance, as a control.",
}
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
    environment.filters |= {
        "count_text": count_text,
        "size_text": size_text,
        "score_words": score_words,
    }
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
        definitions=_DEFINITIONS,
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
