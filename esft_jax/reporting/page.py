"""One HTML page that needs nothing beside it."""

import jinja2
from markupsafe import Markup

from esft_jax.reporting import analysis
from esft_jax.reporting.findings import SURE, Findings, answers, count_text, size_text
from esft_jax.reporting.tasks import Choice
from esft_jax.reporting.vocabulary import MIN_COUNT

_WORDS = 20  # shown of each end; the CSV file has all


def render_page(findings: Findings, figures: dict[str, str]) -> str:
    """The page, with figures as `<svg>` elements inside.

    Args:
        figures: see `draw_figures` and `to_svg`.
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
        None if words is None else (words[:_WORDS], words[_WORDS:][-_WORDS:])
        for words in findings.words
    ]
    return environment.get_template("page.html.j2").render(
        findings=findings,
        answers=[answers(findings, i) for i in range(len(findings.choices))],
        figures={name: Markup(svg) for name, svg in figures.items()},
        effective=[_effective(choice, findings.top_k) for choice in findings.choices],
        words=shown,
        min_count=MIN_COUNT,
        sure=SURE,
    )


def _effective(choice: Choice, top_k: int) -> dict[str, float]:
    """Concentration of one task, mean over layers."""
    entropy, simpson = analysis.effective_experts(choice.shares)
    top = analysis.top_k_mass(choice.shares, top_k)
    return {"top": top.mean(), "entropy": entropy.mean(), "simpson": simpson.mean()}
