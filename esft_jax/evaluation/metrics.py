"""Task metrics, and the file of completions they score.

Every metric gives one score in [0, 1] per example (the best over its references) and one figure in
percent for the whole set. Some are computed here, some by a judge model (`judge.Judge`).
"""

import itertools
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any
from unicodedata import normalize

import regex
from pydantic import Field
from sacrebleu.metrics.bleu import BLEU, MAX_NGRAM_ORDER
from sacrebleu.metrics.chrf import CHRF

from esft_jax.errors import InputError
from esft_jax.files import checked, read_json_lines, write_text_atomic

Predictions = Sequence[str]
References = Sequence[Sequence[str]]

# Letters of scripts that put no spaces between words, each with its marks.
_UNSPACED = "".join(
    rf"\p{{{script}}}"
    for script in (
        *("Han", "Bopomofo", "Hiragana", "Katakana", "Yi", "Thai", "Lao", "Khmer", "Myanmar"),
        *("Tibetan", "Tai_Le", "New_Tai_Lue", "Tai_Tham", "Tai_Viet", "Javanese", "Balinese"),
    )
)
_CHARACTER = rf"(?V1)[[{_UNSPACED}]&&\p{{L}}]\p{{M}}*"
_has_unspaced = regex.compile(_CHARACTER).search
_has_unspaced_but_han = regex.compile(rf"(?V1)[[{_UNSPACED}]&&\p{{L}}--\p{{Han}}]").search


@dataclass(frozen=True)
class MetricResult:
    """Scores of one set of predictions.

    Attributes:
        aggregate: in percent, over the examples that have a score.
        per_example: in [0, 1]; None where the judge gave none.
    """

    aggregate: float
    per_example: Sequence[float | None]

    @property
    def failures(self) -> int:
        """Examples without a score."""
        return sum(score is None for score in self.per_example)


@dataclass(frozen=True)
class Metric:
    """A named metric.

    Attributes:
        name: of the metric.
        compute: scores; may assume at least one example, and answers without a fault. None if a
            judge model scores.
        fault: what makes an answer useless to this metric, or None.
        rubric: what the judge model is to look at.
        tokens: what the metric counts, where that follows from the answers. Raises an `InputError`
            if all of them together are of no use.
    """

    name: str
    compute: Callable[[Predictions, References], MetricResult] | None
    fault: Callable[[str], str | None] = lambda answer: None
    rubric: str | None = None
    tokens: Callable[[References], str] | None = None

    def label(self, references: References) -> str:
        """The name, and what is counted: two figures compare only under the same label.

        Raises:
            InputError: this metric says nothing about such answers.
        """
        return self.name if self.tokens is None else f"{self.name} ({self.tokens(references)})"

    def check(self, answers: Sequence[str], where: str) -> None:
        """Check the accepted answers of the example at `where`.

        Raises:
            InputError: There is none, or one that this metric cannot use.
        """
        if not answers:
            raise InputError(f"{where}: no answers for {self.name}; expected at least one")
        for answer in answers:
            if fault := self.fault(answer):
                raise InputError(f"{where}: an answer {fault}, which {self.name} needs")

    def score(self, predictions: Predictions, references: References) -> MetricResult:
        """Score predictions against one or more accepted answers each.

        Texts that Unicode calls equivalent, such as é in one or in two characters, are equal.

        Raises:
            InputError: There is nothing to score; see also `check` and `label`.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} examples")
        if not predictions:
            raise InputError(f"{self.name}: no examples; expected at least one")
        for index, answers in enumerate(references):
            self.check(answers, f"example {index}")
        assert self.compute is not None, "a judge model scores"
        return self.compute(
            [normalize("NFC", prediction) for prediction in predictions],
            [[normalize("NFC", answer) for answer in answers] for answers in references],
        )


def _intent(predictions: Predictions, references: References) -> MetricResult:
    """Exact match of JSON values, where the order of keys and of list elements does not count.

    These are the rules behind the reference's stored scores: the completion is the JSON object,
    perhaps followed by a full stop, and nothing else; anything that does not parse scores 0.
    """
    return _mean_result(
        [
            float(_canonical_json(prediction) in map(_canonical_json, answers))
            for prediction, answers in zip(predictions, references, strict=True)
        ]
    )


def _not_json(answer: str) -> str | None:
    return "is not JSON" if _canonical_json(answer) is None else None


def _no_text(answer: str) -> str | None:
    return None if answer.strip() else "has no text"


def _no_words(answer: str) -> str | None:
    return None if _WordTokenizer().tokenize(answer) else "has no words"


def _canonical_json(text: str) -> str | None:
    """One spelling for all JSON texts that count as equal; None if `text` is not JSON."""
    try:
        return _canonical(json.loads(text.strip().removesuffix("。").removesuffix(".")))
    except (ValueError, RecursionError):
        return None


def _canonical(value: Any) -> str:
    if isinstance(value, dict):
        members = (f"{_canonical(key)}: {_canonical(item)}" for key, item in value.items())
        return "{" + ", ".join(sorted(members)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(sorted(map(_canonical, value))) + "]"
    # Once more, since escapes hide what they stand for.
    return json.dumps(normalize("NFC", value) if isinstance(value, str) else value)


def _exact_match(predictions: Predictions, references: References) -> MetricResult:
    """Equality of texts, outer white space aside."""
    pairs = zip(predictions, references, strict=True)
    return _mean_result(
        [float(text.strip() in [answer.strip() for answer in answers]) for text, answers in pairs]
    )


def _chrf(predictions: Predictions, references: References) -> MetricResult:
    """chrF2 of sacrebleu: character n-grams up to 6, recall weighted twice."""
    return _sacrebleu(CHRF(), CHRF(), predictions, references)


def _bleu(predictions: Predictions, references: References) -> MetricResult:
    """BLEU of sacrebleu; single sentences with the orders they are long enough for."""
    name = _bleu_tokens(references)
    if name != "13a":  # sacrebleu's `zh` overlooks rare Chinese characters
        predictions = [_split(prediction) for prediction in predictions]
        references = [[_split(answer) for answer in answers] for answers in references]
    tokenizer = name.removesuffix("+char")
    return _sacrebleu(
        BLEU(tokenize=tokenizer),
        BLEU(tokenize=tokenizer, effective_order=True),
        predictions,
        references,
    )


def _bleu_tokens(references: References) -> str:
    """What BLEU counts: `13a` or `zh`, as sacrebleu calls them, or `zh+char`.

    `13a` splits at spaces, so answers in a script without any would be one word each. `zh` is the
    same with Chinese characters as single tokens; `zh+char` with those of other such scripts too.
    All answers have one of them, so that a set of several languages has one BLEU.

    Raises:
        InputError: no answer has four tokens, so that BLEU is 0 whatever is predicted.
    """
    answers = [normalize("NFC", answer) for each in references for answer in each]
    name = "13a"
    if any(map(_has_unspaced, answers)):
        name = "zh+char" if any(map(_has_unspaced_but_han, answers)) else "zh"
    tokenize = BLEU(tokenize=name.removesuffix("+char")).tokenizer
    longest = max((len(tokenize(_split(answer)).split()) for answer in answers), default=0)
    if longest < MAX_NGRAM_ORDER:
        raise InputError(
            f"bleu: the longest answer has {longest} tokens ({name}), and BLEU counts sequences of "
            f"{MAX_NGRAM_ORDER}; expected a longer answer, or metric chrf or exact_match"
        )
    return name


def _split(text: str) -> str:
    return regex.sub(f"({_CHARACTER})", r" \1 ", text)


def _sacrebleu(
    corpus: BLEU | CHRF,
    sentence: BLEU | CHRF,
    predictions: Predictions,
    references: References,
) -> MetricResult:
    # sacrebleu wants one list per reference number; None fills in where an example has fewer.
    streams: Any = [list(stream) for stream in itertools.zip_longest(*references)]
    return MetricResult(
        aggregate=corpus.corpus_score(predictions, streams).score,
        per_example=[
            # A perfect BLEU comes out as 100 and a rounding error.
            min(sentence.sentence_score(prediction, answers).score / 100, 1.0)
            for prediction, answers in zip(predictions, references, strict=True)
        ],
    )


class _WordTokenizer:
    """Lower-case words and numbers in any script; one by one, the characters of scripts that put no
    spaces between words, and symbols such as emoji.

    On ASCII text this equals rouge-score's own tokenizer, which drops every other letter.
    """

    _token = regex.compile(
        rf"{_CHARACTER}|[[\p{{L}}\p{{N}}\p{{M}}]--[[{_UNSPACED}]&&\p{{L}}]]+|\p{{So}}"
    )

    def tokenize(self, text: str) -> list[str]:
        return self._token.findall(normalize("NFC", text.lower()))


def _rouge_l(predictions: Predictions, references: References) -> MetricResult:
    """F1 of the longest common subsequence of words."""
    # Not at the top of the module: it loads NLTK, two seconds that the other metrics do not need.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_WordTokenizer())
    return _mean_result(
        [
            float(max(scorer.score(answer, prediction)["rougeL"].fmeasure for answer in answers))
            for prediction, answers in zip(predictions, references, strict=True)
        ]
    )


def _mean_result(scores: list[float]) -> MetricResult:
    return MetricResult(100 * sum(scores) / len(scores), scores)


_SUMMARY = (
    "The task is to summarise a text. Reward a summary that states the points of the text that "
    "matter most, as the references do, in few words; that says nothing the text does not support; "
    "and that reads well on its own. Take points off for every main point left out, and more for "
    "every statement that is wrong."
)
_LAW = (
    "The task is a question of law: to name what applies to a case, and to reason from it to a "
    "result. Reward an answer that reaches the result of the references on the same legal grounds, "
    "with the conditions and exceptions that matter. A wrong result, or a law or fact that is made "
    "up, costs most points however well it is argued."
)
_TRANSLATION = (
    "The task is to translate. Reward a translation that carries the whole meaning of the source, "
    "as the references do, in natural wording of the target language. Other words than the "
    "references' are welcome when they mean the same. Take points off for what is left out, added "
    "or changed in meaning, for names and numbers that differ, and for text left in the source "
    "language."
)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("intent", _intent, _not_json),
        Metric("exact_match", _exact_match),
        Metric("chrf", _chrf, _no_text),
        Metric("bleu", _bleu, _no_text, tokens=_bleu_tokens),
        Metric("rouge_l", _rouge_l, _no_words),
        Metric("judge_summary", None, _no_text, _SUMMARY),
        Metric("judge_law", None, _no_text, _LAW),
        Metric("judge_translation", None, _no_text, _TRANSLATION),
    )
}


@dataclass(frozen=True)
class Completion:
    """One completion of an evaluation run, with its score if it has one."""

    prompt: str
    raw_prediction: str
    raw_answers: tuple[str, ...]
    score: float | None


def write_completions(path: str | os.PathLike[str], completions: Iterable[Completion]) -> None:
    """Write completions in the reference's format: one JSON object per line.

    `{"example": {"prompt", "raw_prediction", "raw_answers"}, "score"}`
    """
    lines = []
    for completion in completions:
        score = completion.score
        row = {
            "example": {
                "prompt": completion.prompt,
                "raw_prediction": completion.raw_prediction,
                "raw_answers": list(completion.raw_answers),
            },
            # The reference writes 1, not 1.0.
            "score": int(score) if score is not None and score == int(score) else score,
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_text_atomic(path, "".join(lines))


@dataclass(frozen=True)
class _Example:
    prompt: str
    raw_prediction: str
    raw_answers: tuple[str, ...]


@dataclass(frozen=True)
class _Row:
    example: _Example
    score: Annotated[float, Field(ge=0, le=1)] | None


def read_completions(path: str | os.PathLike[str]) -> list[Completion]:
    """Read a completions file; `InputError` names the file, line and key that is wrong."""
    completions = []
    for where, value in read_json_lines(path):
        row = checked(_Row, value, where)
        example = row.example
        completions.append(
            Completion(example.prompt, example.raw_prediction, example.raw_answers, row.score)
        )
    return completions
