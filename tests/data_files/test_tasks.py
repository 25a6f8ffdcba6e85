"""What the shipped task files promise. `ESFT_CORPUS` names a built corpus to check against."""

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "data"
SPLITS = ("train", "valid", "eval")
# Examples for training, and bytes of the folder at most.
TASKS = {
    "intent": (4000, 1.5e6),
    "translation": (4000, 3e6),
    "licence": (3817, 1.5e6),
    "docstring": (3764, 1.7e6),
    "arithmetic": (4000, 1.5e6),
}
# Tasks whose answers repeat.
CLOSED = ("intent", "licence", "arithmetic")
HELD_OUT = sorted(path.stem for path in (DATA / "held_out").iterdir())
ARTICLES = {"the", "my", "our", "a", "an"}
# Books that repeat each other, by their number in the Bible.
NEAR_DUPLICATES = [{40, 41, 42, 43, 62, 63, 64}, {49, 51}, {52, 53}, {54, 55, 56}, {61, 65}]


def rows(task: str, split: str) -> list[dict[str, Any]]:
    lines = (DATA / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def pairs(task: str, split: str) -> list[tuple[str, str]]:
    """(user text without the instruction, answer) of every row."""
    if split == "eval":
        texts = [(row["prompt"], row["answers"][0]) for row in rows(task, split)]
    else:
        texts = [tuple(m["content"] for m in row["messages"]) for row in rows(task, split)]
    return [(prompt.split(": ", 1)[1], answer) for prompt, answer in texts]


def sources(task: str, split: str) -> set[str]:
    return {row["source"] for row in rows(task, split)}


def skeletons(split: str) -> set[str]:
    """Sentences with every slot value replaced by its slot, and without articles.

    The domain is no slot of a sentence: templates spell it out.
    """
    found = set()
    for sentence, answer in pairs("intent", split):
        for slot, value in json.loads(answer)["slots"].items():
            if slot == "domain":
                continue
            sentence = re.sub(rf"\b{re.escape(str(value))}\b", f"{{{slot}}}", sentence)
        found.add(" ".join(word for word in sentence.split() if word not in ARTICLES))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_formats_and_sizes(task: str) -> None:
    train, most_bytes = TASKS[task]
    for split, count in zip(SPLITS, (train, 200, 300), strict=True):
        examples = rows(task, split)
        assert len(examples) == count
        for number, row in enumerate(examples):
            if split == "eval":
                assert row.keys() == {"idx", "prompt", "raw_answers", "answers", "source"}
                assert row["idx"] == number
                assert len(row["raw_answers"]) == len(row["answers"]) == 1
            else:
                assert row.keys() == {"id", "dataset", "messages", "source"}
                assert [m["role"] for m in row["messages"]] == ["user", "assistant"]
    size = sum(path.stat().st_size for path in (DATA / task).iterdir())
    assert size < most_bytes


@pytest.mark.parametrize("task", TASKS)
def test_no_text_is_in_two_splits(task: str) -> None:
    texts = {split: {text for pair in pairs(task, split) for text in pair} for split in SPLITS}
    if task in CLOSED:
        texts = {split: {sentence for sentence, _ in pairs(task, split)} for split in SPLITS}
    for split, other in (("train", "valid"), ("train", "eval"), ("valid", "eval")):
        assert not texts[split] & texts[other]


def test_intent_templates_are_disjoint() -> None:
    templates = json.loads((DATA / "intent/templates.json").read_text(encoding="utf-8"))
    assert len(set(templates.values())) == len(templates)
    held_out = sources("intent", "valid") | sources("intent", "eval")
    assert held_out | sources("intent", "train") <= templates.keys()
    assert not held_out & sources("intent", "train")
    assert not (skeletons("valid") | skeletons("eval")) & skeletons("train")


def test_intent_answers_were_all_seen_in_training() -> None:
    combinations, values = set(), defaultdict(set)
    for _, answer in pairs("intent", "train"):
        label = json.loads(answer)
        combinations.add((label["intent"], *label["slots"]))
        for slot, value in label["slots"].items():
            values[slot].add(value)
    assert 15 <= len({intent for intent, *_ in combinations}) <= 25
    for split in ("valid", "eval"):
        for _, answer in pairs("intent", split):
            label = json.loads(answer)
            assert list(label) == ["intent", "slots"]
            assert (label["intent"], *label["slots"]) in combinations
            assert all(value in values[slot] for slot, value in label["slots"].items())


def test_intent_sentences_have_one_answer() -> None:
    answers = defaultdict(set)
    for split in SPLITS:
        for sentence, answer in pairs("intent", split):
            answers[sentence].add(answer)
    assert all(len(found) == 1 for found in answers.values())


def test_translation_is_split_by_book() -> None:
    books = {
        split: {int(source.split(":")[0]) for source in sources("translation", split)}
        for split in SPLITS
    }
    assert not books["train"] & (books["valid"] | books["eval"])
    assert not books["valid"] & books["eval"]
    assert set().union(*books.values()) == set(range(40, 67))
    for group in NEAR_DUPLICATES:
        assert sum(bool(group & found) for found in books.values()) == 1


def test_licences_are_named_as_in_training() -> None:
    def answers(split: str) -> set[str]:
        return {answer for _, answer in pairs("licence", split)}

    assert answers("valid") | answers("eval") <= answers("train")
    assert all(json.loads(answer).keys() == {"licence", "category"} for answer in answers("train"))


def test_held_out_notices_are_unlike_those_of_training() -> None:
    def words(split: str) -> list[set[str]]:
        return [set(re.findall("[a-z]+", text.lower())) for text, _ in pairs("licence", split)]

    training = words("train")
    for own in words("eval") + words("valid"):
        assert max(len(own & other) / len(own | other) for other in training) < 0.7


def test_sums_of_word_problems_are_right() -> None:
    for split in SPLITS:
        for story, answer in pairs("arithmetic", split):
            for line in answer.split("; "):
                left, operator, right, equals, result = line.split()
                a, b = int(left), int(right)
                assert equals == "="
                assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[operator]
            numbers = set(re.findall(r"\d+", story))
            assert numbers <= set(re.findall(r"\d+", answer))


def test_patterns_of_word_problems_are_disjoint() -> None:
    held_out = sources("arithmetic", "valid") | sources("arithmetic", "eval")
    assert len(held_out) == 500
    assert not held_out & sources("arithmetic", "train")


@pytest.mark.parametrize("domain", HELD_OUT)
def test_held_out_text_of_the_corpus(domain: str) -> None:
    lines = (DATA / "held_out" / f"{domain}.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    texts = [json.loads(line) for line in lines]
    assert all(text.keys() == {"text"} for text in texts)
    assert 79_000 <= sum(len(text["text"].encode()) for text in texts) < 125_000


@pytest.mark.skipif("ESFT_CORPUS" not in os.environ, reason="ESFT_CORPUS names no built corpus")
def test_shipped_text_and_the_corpus() -> None:
    for domain in HELD_OUT:
        corpus = Path(os.environ["ESFT_CORPUS"]) / f"{domain}.valid.jsonl"
        assert corpus.read_bytes() == (DATA / "held_out" / f"{domain}.jsonl").read_bytes()
    known = set()
    for path in Path(os.environ["ESFT_CORPUS"]).glob("*.jsonl"):
        with path.open(encoding="utf-8") as lines:
            known |= {
                part.strip() for line in lines for part in json.loads(line)["text"].split("\n")
            }
    assert len(known) > 100_000
    for task in TASKS:
        texts = {text for split in SPLITS for pair in pairs(task, split) for text in pair}
        assert not texts & known
