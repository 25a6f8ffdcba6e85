"""Chats: every answer must be the one that its question asks for."""

import importlib
import json
import random
import re
from pathlib import Path
from types import ModuleType

import pytest

TEXTS = {
    "dictionary": [
        'abbey (noun): a church with monks; "the abbey stood alone"\n'
        "cold, icy (adjective): of low temperature\n"
        'run, go (verb): move fast; "he had to run"\n'
        'make (verb): bring about; "make a fire"',
        *(f"{noun} (noun): a thing" for noun in ("earth", "light", "water", "dew point", "day")),
    ],
    "scripture": [
        "In the beginning God created the heavens and the earth.\nShort.\n"
        "And God called the light Day, and the cold water he called Seas; and he had to run."
    ],
    "python": [
        "class A:\n    def move(self, step=1, *rest):\n        def turn(angle=0, by=2): ..."
    ],
}


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "data")
    return importlib.import_module("chats")


def draw(chats: ModuleType, kind: str) -> list[tuple[str, str]]:
    """Many questions of a kind, without what introduces them, and their answers."""
    material = chats.Material.of(chats.Words.of(TEXTS), TEXTS)
    rng = random.Random(0)
    return [getattr(chats, kind)(rng, material) for _ in range(200)]


def states(record: str, key: str, value: object) -> bool:
    """Whether a written record says so, in one of its forms."""
    forms = (f"{key}: {value}", f"{key} = {value}", f"{key} is {value}", f"{key} {value}")
    ends = r"(?=$|[\n;,]| and the )"
    starts = r"(?:^|[\n;,] | and the |the |\n)"
    return any(
        re.search(starts + re.escape(form) + ends, record) for form in (*forms, f"{value} as {key}")
    )


def test_material_is_read_from_the_documents(chats: ModuleType) -> None:
    words = chats.Words.of(TEXTS)
    # The most frequent first; single words only.
    assert words.nouns == ["abbey", "earth", "light", "water", "day"]
    assert (set(words.verbs), words.adjectives) == ({"run", "make"}, ["cold"])
    material = chats.Material.of(words, TEXTS)
    assert material.functions == [("turn", "angle=0, by=2")]
    assert material.usages[0] == ("abbey", "a church with monks", "the abbey stood alone")
    assert ("cold (adjective)", "of low temperature") in material.definitions
    assert all(len(sentence) > 20 for sentence in material.sentences)


def test_the_field_asked_for(chats: ModuleType) -> None:
    for question, answer in draw(chats, "_field_of_record"):
        asked = re.fullmatch(r"What is the (\w+)\? (.*)", question, re.DOTALL)
        assert asked and states(asked[2], asked[1], answer), (question, answer)


def test_records_and_orders_to_json(chats: ModuleType) -> None:
    for question, answer in draw(chats, "_record_as_json"):
        record = question.removeprefix("As JSON: ")
        fields = json.loads(answer)
        assert all(states(record, key, value) for key, value in fields.items()), (question, answer)
    for question, answer in draw(chats, "_order_as_json"):
        order = json.loads(answer)
        thing = order["with"].pop("object")
        assert re.search(rf"\b{order['do']} (the |a |my )?{thing}\b", question), (question, answer)
        assert list(order["with"]) == sorted(order["with"])
        for preposition, value in order["with"].items():
            assert re.search(rf"\b{preposition} (the )?{value}\b", question), (question, answer)


def test_words_found_repeated_and_continued(chats: ModuleType) -> None:
    for kind in ("_repeat_words", "_repeat_sentence"):
        assert all(question == f"Repeat: {answer}" for question, answer in draw(chats, kind))
    for question, answer in draw(chats, "_next_words"):
        asked = re.fullmatch(r'What follows "(\S+)" in: (.*)', question)
        assert asked and f" {asked[1]} {answer} " in f" {asked[2]} ", (question, answer)
    usages = {("a church with monks", "abbey"), ("move fast", "run"), ("bring about", "make")}
    found = {(q.split('"')[1], answer) for q, answer in draw(chats, "_word_that_means")}
    assert found == usages


def test_signatures_definitions_and_sums(chats: ModuleType) -> None:
    for question, answer in draw(chats, "_signature_as_json"):
        assert question == "Signature: def turn(angle=0, by=2):"
        assert json.loads(answer) == {"function": "turn", "arguments": ["angle", "by"]}
    assert ("Define: make (verb)", "bring about") in draw(chats, "_definition")
    for question, answer in draw(chats, "_arithmetic"):
        assert eval(question.removeprefix("Compute: ")) == int(answer)


def test_streams(chats: ModuleType) -> None:
    words = chats.Words.of(TEXTS)
    first = next(chats.chats(0, words, TEXTS))
    assert first == next(chats.chats(0, words, TEXTS))
    assert re.fullmatch(r"(?s)User: .+\n\nAssistant: .+", first)
    line, *others = next(chats.repetitions(0, words)).split("\n")
    assert others == [line, line] and len(line.split()) >= 5


def test_words_are_drawn_by_zipfs_law(chats: ModuleType) -> None:
    rng, words = random.Random(0), [str(rank) for rank in range(500)]
    drawn = [int(chats._choose(rng, words)) for _ in range(20_000)]
    # The sum of 1 / (rank + offset) over the first ranks, as a share of that over all.
    odds = [1 / (rank + chats.ZIPF_OFFSET + 0.5) for rank in range(500)]
    for ranks in (1, 10, 100):
        share = sum(rank < ranks for rank in drawn) / len(drawn)
        assert share == pytest.approx(sum(odds[:ranks]) / sum(odds), abs=0.02)
    assert max(drawn) > 450
