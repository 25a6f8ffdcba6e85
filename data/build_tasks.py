"""Build the shipped tasks.

    python data/build_tasks.py --output data

writes a folder per task, each with `train.jsonl` and `valid.jsonl` (chat examples) and `eval.jsonl`
(prompts with their accepted answers). Every row names its source: a template of
`intent/templates.json`, a verse (book:chapter:verse), a rule of licensedcode, a function of a
package (file:name), or the pattern of a generated story. Needs the `data` extra.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import licence_notices
import word_problems
from docstrings import Documented, documented_functions
from intents import Grammar, Sample, Template
from packages import (
    KING_JAMES,
    NEW_TESTAMENT,
    OLD_TESTAMENT,
    WORLD_ENGLISH,
    WYCLIFFE,
    Package,
    bible_verses,
    fetch,
)

SEED = 0
SIZES = {"train": 4000, "valid": 200, "eval": 300}
INTENTS_PACKAGE = Package("pip", "home-assistant-intents", "2026.10.27", "Apache-2.0")
LICENCES_PACKAGE = Package("pip", "licensedcode-data", "32.1.0", "CC-BY-4.0")
SYMPY = Package("pip", "sympy", "1.14.0", "BSD-3-Clause")
NETWORKX = Package("pip", "networkx", "3.6.1", "BSD-3-Clause")

LONGEST_SENTENCE = 60  # characters
ARTICLES = {"the", "my", "our", "a", "an"}

# Hebrews and Revelation are evaluated. Books that repeat each other stay in one split: the
# gospels, John with his letters, Ephesians and Colossians, Jude and 2 Peter.
VALID_BOOKS = (59, 60, 61, 65)
EVAL_BOOKS = (58, 66)
SHORTEST_VERSE, LONGEST_VERSE = 20, 200  # characters


@dataclass(frozen=True)
class Example:
    """A user message, the answer, and where both come from."""

    source: str
    prompt: str
    answer: str


def write_splits(folder: Path, splits: dict[str, list[Example]]) -> None:
    """Write the splits of the task that `folder` is named after."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, examples in splits.items():
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            for number, example in enumerate(examples):
                row: dict[str, object]
                if split == "eval":
                    answers = [example.answer]
                    row = {"idx": number, "prompt": example.prompt, "raw_answers": answers}
                    row |= {"answers": answers, "source": example.source}
                else:
                    messages = [
                        {"role": "user", "content": example.prompt},
                        {"role": "assistant", "content": example.answer},
                    ]
                    row = {"id": f"{folder.name}-{split}-{number}", "dataset": folder.name}
                    row |= {"messages": messages, "source": example.source}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")


def skeleton(pattern: str) -> str:
    """Return a pattern without articles: what two templates may not share across splits."""
    return " ".join(word for word in pattern.split() if word not in ARTICLES)


def hold_out(
    templates: Sequence[Template], rng: random.Random
) -> tuple[list[Template], list[Template]]:
    """Divide templates into (training, held out), about a quarter held out.

    Only templates with a sibling of the same intent and the same slots are held out, so that
    what has to be answered was seen in training and only its wording is new.
    """
    siblings: dict[tuple[object, ...], list[Template]] = defaultdict(list)
    for template in dict.fromkeys(templates):
        slots = tuple(sorted({part.split("}")[0] for part in template.text.split("{")[1:]}))
        siblings[template.intent, slots, template.fixed_slots].append(template)
    train: list[Template] = []
    held_out: list[Template] = []
    for group in siblings.values():
        rng.shuffle(group)
        count = min(len(group) - 1, max(1, len(group) // 4))
        held_out += group[:count]
        train += group[count:]
    return train, held_out


def draw(
    grammar: Grammar, templates: Sequence[Template], rng: random.Random, count: int
) -> dict[str, tuple[Template, Sample]]:
    """Draw `count` distinct short sentences; intents, then templates, have equal chances."""
    by_intent: dict[str, list[Template]] = defaultdict(list)
    for template in templates:
        by_intent[template.intent].append(template)
    drawn: dict[str, tuple[Template, Sample]] = {}
    while len(drawn) < count:
        template = rng.choice(by_intent[rng.choice(list(by_intent))])
        sample = grammar.sample(template, rng)
        if len(sample.sentence) <= LONGEST_SENTENCE:
            drawn.setdefault(sample.sentence, (template, sample))
    return drawn


def intent_splits(grammar: Grammar) -> dict[str, list[Example]]:
    """Return examples whose templates are disjoint between training and the other splits."""
    rng = random.Random(SEED)
    train_templates, held_out_templates = hold_out(list(grammar.templates()), rng)
    train = draw(grammar, train_templates, rng, SIZES["train"])
    # A held-out template may still spell what a training template spells: such sentences go.
    seen = {skeleton(sample.pattern) for _, sample in train.values()}
    held_out = {
        sentence: (template, sample)
        for sentence, (template, sample) in draw(grammar, held_out_templates, rng, 1500).items()
        if skeleton(sample.pattern) not in seen
    }
    examples = [intent_example(*found) for found in held_out.values()]
    valid_end = SIZES["valid"]
    return {
        "train": [intent_example(*found) for found in train.values()],
        "valid": examples[:valid_end],
        "eval": examples[valid_end : valid_end + SIZES["eval"]],
    }


def intent_example(template: Template, sample: Sample) -> Example:
    """Return the example of one sentence; intents lose the prefix that they all have."""
    answer = {"intent": template.intent.removeprefix("Hass"), "slots": dict(sample.slots)}
    return Example(template.name, f"Intent of: {sample.sentence}", json.dumps(answer))


def translation_splits(
    wycliffe: Iterable[tuple[int, int, int, str]],
    modern: Iterable[tuple[int, int, int, str]],
    known: set[str],
) -> dict[str, list[Example]]:
    """Pair the verses of the New Testament and split them by book.

    `known` are verses of the pre-training text. Pairs of very different lengths go as well:
    there the two editions count their verses differently.
    """
    middle = {verse[:3]: verse[3] for verse in wycliffe if verse[0] in NEW_TESTAMENT}
    splits: dict[str, list[Example]] = {"train": [], "valid": [], "eval": []}
    used: set[str] = set()
    verses = [verse for verse in modern if verse[0] in NEW_TESTAMENT and verse[:3] in middle]
    random.Random(SEED).shuffle(verses)
    for book, chapter, number, target in verses:
        source = middle[book, chapter, number]
        lengths = sorted((len(source), len(target)))
        fits = lengths[0] >= SHORTEST_VERSE and lengths[1] <= LONGEST_VERSE
        if not fits or lengths[1] > 1.6 * lengths[0] or {source, target} & (known | used):
            continue
        split = "eval" if book in EVAL_BOOKS else "valid" if book in VALID_BOOKS else "train"
        if len(splits[split]) < SIZES[split]:
            used |= {source, target}
            name = f"{book}:{chapter}:{number}"
            splits[split].append(Example(name, f"Modern English: {source}", target))
    return splits


def split_units(units: Sequence[list[Example]]) -> dict[str, list[Example]]:
    """Deal units out whole: to `eval` and `valid` until they have their sizes, then to training.

    Only units of at most five examples are held out, so that these are of many kinds.
    """
    rng = random.Random(SEED)
    splits: dict[str, list[Example]] = {"train": [], "valid": [], "eval": []}
    for unit in rng.sample(units, len(units)):
        for split in ("eval", "valid"):
            if len(unit) <= 5 and len(splits[split]) + len(unit) <= SIZES[split]:
                splits[split] += unit
                break
        else:
            splits["train"] += unit
    rng.shuffle(splits["train"])
    return splits


def licence_splits(found: list[licence_notices.Notice]) -> dict[str, list[Example]]:
    """Return notices and what they name; those that are alike stay in one split."""

    def example(notice: licence_notices.Notice) -> Example:
        answer = {"licence": notice.licence, "category": notice.category}
        return Example(notice.rule, f"Licence of: {notice.text}", json.dumps(answer))

    units = [list(map(example, unit)) for unit in licence_notices.units(found)]
    return split_units(units)


def docstring_splits(functions: Iterable[Documented]) -> dict[str, list[Example]]:
    """Return functions and their first sentences; those that say the same stay in one split."""
    units: dict[str, list[Example]] = defaultdict(list)
    seen: set[str] = set()
    for module, name, code, sentence in functions:
        if code not in seen:
            seen.add(code)
            units[sentence].append(Example(f"{module}:{name}", f"Describe: {code}", sentence))
    return split_units(list(units.values()))


def word_problem_splits() -> dict[str, list[Example]]:
    """Return stories whose patterns are disjoint between the splits."""
    rng = random.Random(SEED)
    patterns = word_problems.patterns()
    rng.shuffle(patterns)
    chosen = iter(patterns)
    # A pattern of `valid` or `eval` is used once; the others are drawn for training.
    held_out = {split: [next(chosen) for _ in range(SIZES[split])] for split in ("valid", "eval")}
    held_out["train"] = rng.choices(list(chosen), k=SIZES["train"])

    def example(pattern: str) -> Example:
        problem = word_problems.tell(pattern, rng)
        return Example(problem.pattern, f"Solve: {problem.text}", problem.answer)

    return {split: list(map(example, held_out[split])) for split in SIZES}


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Build the shipped tasks.")
    parser.add_argument("--output", type=Path, default=Path("data"))
    parser.add_argument("--cache", type=Path, default=Path("build/packages"))
    arguments = parser.parse_args()
    package = fetch(INTENTS_PACKAGE, arguments.cache)
    grammar = Grammar(json.loads(package.read("home_assistant_intents/data/en.json")))
    write_splits(arguments.output / "intent", intent_splits(grammar))
    templates = {template.name: template.text for template in grammar.templates()}
    listing = json.dumps(templates, indent=0, ensure_ascii=False) + "\n"
    (arguments.output / "intent/templates.json").write_text(listing, encoding="utf-8")
    wycliffe, modern, king_james = (
        list(bible_verses(fetch(package, arguments.cache)))
        for package in (WYCLIFFE, WORLD_ENGLISH, KING_JAMES)
    )
    known = {text for book, *_, text in [*modern, *king_james] if book in OLD_TESTAMENT}
    splits = translation_splits(wycliffe, modern, known)
    write_splits(arguments.output / "translation", splits)
    notices = licence_notices.notices(fetch(LICENCES_PACKAGE, arguments.cache))
    write_splits(arguments.output / "licence", licence_splits(notices))
    functions = [
        function
        for package in (SYMPY, NETWORKX)
        for function in documented_functions(fetch(package, arguments.cache))
    ]
    write_splits(arguments.output / "docstring", docstring_splits(functions))
    write_splits(arguments.output / "arithmetic", word_problem_splits())


if __name__ == "__main__":
    main()
