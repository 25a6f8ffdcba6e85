"""The corpus builder's own parts, without any download."""

import importlib
import random
from pathlib import Path
from types import ModuleType

import pytest

DATA = Path(__file__).parents[2] / "data"


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DATA)
    return importlib.import_module("build_corpus")


def test_documents_are_bounded_and_complete(builder: ModuleType) -> None:
    paragraphs = [f"{number}:" + "x" * (number % 700) for number in range(200)]
    documents = list(builder.pack_paragraphs(paragraphs, "\n"))
    assert "\n".join(documents).split("\n") == paragraphs
    sizes = [len(document) for document in documents]
    assert min(sizes) >= builder.MIN_DOCUMENT
    assert max(sizes) < 1.1 * builder.MAX_DOCUMENT


def test_repeats_go_and_short_paragraphs_stay(builder: ModuleType) -> None:
    long, same = "A long  line " * 10, "a long line " * 10
    assert list(builder.without_repeats([long, "short", same, "short"], set())) == [
        long,
        "short",
        "short",
    ]


def test_units_are_never_divided(builder: ModuleType) -> None:
    documents = [(f"unit{number % 50}", f"{number}" * 600) for number in range(400)]
    valid, train = builder.split(iter(documents), limit=10**9)
    assert sorted(valid + train) == sorted(text for _, text in documents)
    unit_of = {text: unit for unit, text in documents}
    assert not {unit_of[text] for text in valid} & {unit_of[text] for text in train}
    assert sum(map(len, valid)) >= builder.VALID_BYTES
    assert (valid, train) == builder.split(iter(documents), limit=10**9)


def test_a_long_unit_is_not_held_out(builder: ModuleType) -> None:
    valid, train = builder.split([("long", "x" * 50_000), ("short", "y" * 500)], limit=10**9)
    assert [len(text) for text in valid] == [500]
    assert [len(text) for text in train] == [50_000]


def test_arithmetic_is_correct(builder: ModuleType) -> None:
    arithmetic = importlib.import_module("arithmetic")
    rng = random.Random(1)
    for _ in range(300):
        for kind in ("Sums", "Differences", "Products"):
            sides = arithmetic.EXERCISES[kind](rng).split(" = ")
            assert len({eval(side) for side in sides}) == 1
        left, right = arithmetic.EXERCISES["Divisions"](rng).split(" = ")
        quotient, _, rest = right.partition(" rest ")
        dividend, divisor = map(int, left.split(" / "))
        assert divmod(dividend, divisor) == (int(quotient), int(rest or 0))
        assert eval(arithmetic.EXERCISES["Comparisons"](rng).replace(" = ", " == "))
        *_, factor_x, x = arithmetic.EXERCISES["Equations"](rng).split("; ")
        factor, product = factor_x.split("x = ")
        assert int(factor) * int(x.removeprefix("x = ")) == int(product)
    assert list(arithmetic.worksheets(0, 5)) == list(arithmetic.worksheets(0, 5))
