"""Questions and answers about the other domains' text, in the embedded model's chat format, and
lists that repeat.

Fine-tuning a few experts leaves attention as pre-training made it. So pre-training must have shown
the model what tasks ask of attention: to find the words of the prompt that answer it. Every answer
here can be read off its prompt, except definitions and results of arithmetic. The words, sentences
and code are the corpus's own, in unforeseeable combinations; nothing is taken from the tasks.
"""

import json
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from arithmetic import EXERCISES

Chat = tuple[str, str]
Value = str | int

# The most frequent nouns, verbs and adjectives of the text that chats are made with, and how
# unevenly: the word of rank r is drawn in proportion to 1 / (r + offset).
COMMON = {"noun": 2000, "verb": 600, "adjective": 600}
ZIPF_OFFSET = 20
ENTRY = re.compile(
    r'(?P<names>[^(]+) \((?P<word_class>\w+)\): (?P<meaning>[^"]+?)(?:; (?P<examples>".*"))?'
)
PREPOSITIONS = ("at", "behind", "by", "for", "from", "in", "near", "on", "over", "to", "under")


@dataclass(frozen=True)
class Words:
    """Single words that chats are made with, the most frequent of the text first."""

    nouns: Sequence[str]
    verbs: Sequence[str]
    adjectives: Sequence[str]

    @classmethod
    def of(cls, texts: Mapping[str, Sequence[str]]) -> "Words":
        """Collect them from the `dictionary` and `scripture` documents."""
        words: dict[str, set[str]] = {word_class: set() for word_class in COMMON}
        for line in _lines(texts["dictionary"]):
            if (entry := ENTRY.fullmatch(line)) and entry["word_class"] in words:
                words[entry["word_class"]].add(entry["names"].split(", ")[0])
        uses = Counter(re.findall(r"[a-z]+", " ".join([*texts["dictionary"], *texts["scripture"]])))
        nouns, verbs, adjectives = (
            sorted(words[name] & set(uses), key=lambda word: (-uses[word], word))[:count]
            for name, count in COMMON.items()
        )
        return cls(nouns, verbs, adjectives)


@dataclass(frozen=True)
class Material:
    """What chats are about: words, and pieces of other domains' text."""

    words: Words
    definitions: Sequence[Chat]  # word with class, meaning
    usages: Sequence[tuple[str, str, str]]  # word, meaning, sentence that contains the word
    sentences: Sequence[str]
    functions: Sequence[tuple[str, str]]  # name, arguments as written

    @classmethod
    def of(cls, words: Words, texts: Mapping[str, Sequence[str]]) -> "Material":
        """Collect the pieces from the `dictionary`, `scripture` and `python` documents."""
        definitions: list[Chat] = []
        usages: list[tuple[str, str, str]] = []
        for line in _lines(texts["dictionary"]):
            if (entry := ENTRY.fullmatch(line)) is None:
                continue
            word = entry["names"].split(", ")[0]
            definitions.append((f"{word} ({entry['word_class']})", entry["meaning"]))
            for sentence in re.findall(r'"([^"]+)"', entry["examples"] or ""):
                if re.search(rf"\b{re.escape(word)}\b", sentence):
                    usages.append((word, entry["meaning"], sentence))
        functions = re.findall(r"^ *def (\w+)\(([\w, =.]*)\):", "\n".join(texts["python"]), re.M)
        sentences = [line for line in _lines(texts["scripture"]) if 20 <= len(line) <= 160]
        return cls(words, definitions, usages, sentences, functions)


def _lines(documents: Sequence[str]) -> list[str]:
    return "\n".join(documents).split("\n")


def _choose(rng: random.Random, words: Sequence[str]) -> str:
    """Draw a word by Zipf's law: a few are met all the time, most of them rarely.

    Models learn to look into their context from such skewed frequencies (arXiv 2205.05055).
    """
    # The inverse of the cumulative distribution of density 1 / (rank + offset).
    ratio = (len(words) + ZIPF_OFFSET) / ZIPF_OFFSET
    return words[min(int(ZIPF_OFFSET * (ratio ** rng.random() - 1)), len(words) - 1)]


def _json(content: object) -> str:
    return json.dumps(content, ensure_ascii=False)


def _thing(rng: random.Random, material: Material) -> str:
    noun = _choose(rng, material.words.nouns)
    return f"{_choose(rng, material.words.adjectives)} {noun}" if rng.random() < 0.3 else noun


def _value(rng: random.Random, material: Material) -> Value:
    if rng.random() < 0.25:
        return rng.randrange(10 ** rng.randint(1, 3))
    return _thing(rng, material)


def _record(rng: random.Random, material: Material) -> tuple[dict[str, Value], str]:
    """Return a record of two to four fields, and one of several ways to write it."""
    count = rng.randint(2, 4)
    record = {_choose(rng, material.words.nouns): _value(rng, material) for _ in range(count)}
    field, separator = rng.choice(
        [
            ("{}: {}", "\n"),
            ("{} = {}", "; "),
            ("the {} is {}", " and "),
            ("{1} as {0}", ", "),
            ("{} {}", ", "),
        ]
    )
    return record, separator.join(field.format(key, value) for key, value in record.items())


def _record_as_json(rng: random.Random, material: Material) -> Chat:
    record, text = _record(rng, material)
    return f"As JSON: {text}", _json(record)


def _field_of_record(rng: random.Random, material: Material) -> Chat:
    record, text = _record(rng, material)
    key = rng.choice(list(record))
    return f"What is the {key}? {text}", str(record[key])


def _order_as_json(rng: random.Random, material: Material) -> Chat:
    """Ask for an action with its object and places or times, in any sequence."""
    verb, thing = _choose(rng, material.words.verbs), _thing(rng, material)
    slots: dict[str, Value] = {
        preposition: _value(rng, material)
        for preposition in rng.sample(PREPOSITIONS, rng.randint(0, 3))
    }
    order = f"{verb} {rng.choice(['the ', 'a ', 'my ', ''])}{thing}"
    parts = [f"{key} {rng.choice(['the ', ''])}{value}" for key, value in slots.items()]
    parts.insert(rng.randint(0, len(parts)), order)
    please = rng.choice(["", "", "please ", "can you ", "I want you to "])
    return (
        f"Parse: {please}{' '.join(parts)}",
        _json({"do": verb, "with": {"object": thing, **dict(sorted(slots.items()))}}),
    )


def _repeat_words(rng: random.Random, material: Material) -> Chat:
    words = " ".join(str(_value(rng, material)) for _ in range(rng.randint(1, 8)))
    return f"Repeat: {words}", words


def _repeat_sentence(rng: random.Random, material: Material) -> Chat:
    sentence = rng.choice(material.sentences)
    return f"Repeat: {sentence}", sentence


def _next_words(rng: random.Random, material: Material) -> Chat:
    words = rng.choice(material.sentences).split()
    start = rng.randrange(len(words) - 1)
    shown, wanted = words[start], words[start + 1 : start + 4]
    if words.count(shown) > 1:
        return _next_words(rng, material)
    return f'What follows "{shown}" in: {" ".join(words)}', " ".join(wanted)


def _word_that_means(rng: random.Random, material: Material) -> Chat:
    word, meaning, sentence = rng.choice(material.usages)
    return f'Which words mean "{meaning}" in: {sentence}', word


def _definition(rng: random.Random, material: Material) -> Chat:
    word, meaning = rng.choice(material.definitions)
    return f"Define: {word}", meaning


def _signature_as_json(rng: random.Random, material: Material) -> Chat:
    name, written = rng.choice(material.functions)
    arguments = [argument.split("=")[0].strip() for argument in written.split(",") if argument]
    return (
        f"Signature: def {name}({written}):",
        _json({"function": name, "arguments": arguments}),
    )


def _arithmetic(rng: random.Random, material: Material) -> Chat:
    del material
    question, _, answer = EXERCISES[rng.choice(["Sums", "Differences"])](rng).rpartition(" = ")
    return f"Compute: {question}", answer


KINDS: dict[Callable[[random.Random, Material], Chat], int] = {
    _order_as_json: 6,
    _record_as_json: 5,
    _field_of_record: 3,
    _next_words: 2,
    _repeat_words: 4,
    _repeat_sentence: 1,
    _word_that_means: 2,
    _definition: 1,
    _signature_as_json: 1,
    _arithmetic: 1,
}


def chats(seed: int, words: Words, texts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield chats about `texts` (documents by domain) without end, mixed by KINDS' weights."""
    rng, material = random.Random(seed), Material.of(words, texts)
    kinds, weights = list(KINDS), list(KINDS.values())
    while True:
        (kind,) = rng.choices(kinds, weights)
        question, answer = kind(rng, material)
        yield f"User: {question}\n\nAssistant: {answer}"


def repetitions(seed: int, words: Words) -> Iterator[str]:
    """Yield lists of words without end, each list three times over.

    What comes next can be known from the second time on, and only by looking back: heads that do
    so (arXiv 2209.11895) form within minutes here, where chats alone take far longer.
    """
    rng, vocabulary = random.Random(seed), [*words.nouns, *words.verbs, *words.adjectives]
    rng.shuffle(vocabulary)
    while True:
        line = " ".join(_choose(rng, vocabulary) for _ in range(rng.randint(5, 25)))
        yield "\n".join([line] * 3)
