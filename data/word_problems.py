"""Generated word problems: a few sentences of a story, answered by the sums that it asks for."""

import itertools
import random
from collections.abc import Callable
from typing import NamedTuple

NAMES = ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas"]
THINGS = ["apples", "books", "candles", "coins", "eggs", "marbles", "pencils", "stamps"]

# Ways to say the same; which of them a story uses is its pattern.
OPENINGS = [
    "{name} has {a} {things}.",
    "There are {a} {things} in {name}'s room.",
    "{name} begins with {a} {things}.",
    "In the morning {name} counts {a} {things}.",
    "{name} owns {a} {things}.",
]
GAINS = [
    "{name} buys {b} more.",
    "A friend gives {name} {b} more.",
    "Then {name} finds {b} others.",
    "{b} are added.",
    "{name} gets {b} as a present.",
    "Another {b} arrive by mail.",
]
LOSSES = [
    "{name} gives {b} away.",
    "{b} of them get lost.",
    "{name} sells {b} at the market.",
    "A neighbour takes {b} of them.",
    "{b} are broken and thrown out.",
    "{name} hands {b} to a sister.",
]
BAGS = [
    "{name} buys {c} bags with {b} in each.",
    "{c} boxes of {b} are added.",
    "Then {c} friends bring {b} each.",
    "{name} wins {b} on each of {c} days.",
    "From {c} shelves {b} each are added.",
]
QUESTIONS = [
    "How many {things} does {name} have now?",
    "How many {things} are there in the end?",
    "What is the number of {things} now?",
    "How many {things} are left?",
]


class Problem(NamedTuple):
    """A story, its sums, and the names of the ways in which it is told."""

    pattern: str
    text: str
    answer: str


def _gain(total: int, rng: random.Random) -> tuple[dict[str, int], str, int]:
    b = rng.randint(2, 60)
    return {"b": b}, f"{total} + {b} = {total + b}", total + b


def _loss(total: int, rng: random.Random) -> tuple[dict[str, int], str, int]:
    b = rng.randint(1, total // 2)
    return {"b": b}, f"{total} - {b} = {total - b}", total - b


def _bags(total: int, rng: random.Random) -> tuple[dict[str, int], str, int]:
    c, b = rng.randint(2, 9), rng.randint(2, 9)
    return (
        {"b": b, "c": c},
        f"{c} * {b} = {c * b}; {total} + {c * b} = {total + c * b}",
        total + c * b,
    )


STEPS: dict[str, tuple[list[str], Callable]] = {
    "gain": (GAINS, _gain),
    "loss": (LOSSES, _loss),
    "bags": (BAGS, _bags),
}


def patterns() -> list[str]:
    """All ways to tell a story of two steps: `opening.step-way.step-way.question`."""
    steps = [f"{kind}-{way}" for kind, (ways, _) in STEPS.items() for way in range(len(ways))]
    parts = (map(str, range(len(OPENINGS))), steps, steps, map(str, range(len(QUESTIONS))))
    return [".".join(chosen) for chosen in itertools.product(*parts)]


def tell(pattern: str, rng: random.Random) -> Problem:
    """Make a problem of a pattern."""
    opening, *steps, question = pattern.split(".")
    name, things, total = rng.choice(NAMES), rng.choice(THINGS), rng.randint(10, 60)
    sentences = [OPENINGS[int(opening)].format(name=name, things=things, a=total)]
    sums = []
    for step in steps:
        kind, way = step.split("-")
        ways, make = STEPS[kind]
        numbers, line, total = make(total, rng)
        sentences.append(ways[int(way)].format(name=name, **numbers))
        sums.append(line)
    sentences.append(QUESTIONS[int(question)].format(name=name, things=things))
    return Problem(pattern, " ".join(sentences), "; ".join(sums))
