"""Which words of a task meet the most tuned experts (paper, Fig. 9)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from esft_jax.data.tokenizer import Tokenizer
from esft_jax.reporting import analysis
from esft_jax.routing.log import RoutingLog

MIN_COUNT = 10  # the mean of fewer places is chance
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


@dataclass(frozen=True)
class Word:
    """One entry of the vocabulary.

    Attributes:
        text: its text with white space made visible, or its number without a tokenizer.
        count: places where it comes.
        met: chosen experts among its K, mean over places and layers.
    """

    text: str
    token: int
    count: int
    met: float


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer in a model's folder, if one is there."""
    return Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None


def rank_words(
    log: RoutingLog | None, chosen: Bool[np.ndarray, "L E"], tokenizer: Tokenizer | None
) -> list[Word] | None:
    """The words of a task that come `MIN_COUNT` times, most tuned experts first.

    None where the routing, or which tokens it is of, is not known.
    """
    if log is None or log.tokens is None:
        return None
    met = analysis.tuned_met(log, chosen).mean(axis=0)
    columns = analysis.words(log.tokens, met, MIN_COUNT)
    return [
        Word(_text(token, tokenizer), token, count, mean)
        for token, count, mean in zip(*(column.tolist() for column in columns), strict=True)
    ]


def _text(token: int, tokenizer: Tokenizer | None) -> str:
    text = f"#{token}" if tokenizer is None else tokenizer.decode([token])
    return "".join(_VISIBLE.get(letter, letter) for letter in text) or f"#{token}"
