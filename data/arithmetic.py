"""Generated arithmetic exercises: a domain of the pre-training corpus with no foreign text."""

import random
from collections.abc import Callable, Iterator


def _number(rng: random.Random) -> int:
    """Return a number whose digit count, not its value, is uniform."""
    return rng.randrange(10 ** rng.randint(1, 4))


def _sum(rng: random.Random) -> str:
    a, b = _number(rng), _number(rng)
    return f"{a} + {b} = {a + b}"


def _difference(rng: random.Random) -> str:
    a, b = _number(rng), _number(rng)
    return f"{a} - {b} = {a - b}"


def _product(rng: random.Random) -> str:
    a, b = rng.randrange(100), rng.randrange(100)
    if b < 10 or a < 10:
        return f"{a} * {b} = {a * b}"
    tens, units = b // 10 * 10, b % 10
    return f"{a} * {b} = {a} * {tens} + {a} * {units} = {a * tens} + {a * units} = {a * b}"


def _division(rng: random.Random) -> str:
    divisor, dividend = rng.randrange(2, 20), rng.randrange(1000)
    quotient, rest = divmod(dividend, divisor)
    return f"{dividend} / {divisor} = {quotient}" + (f" rest {rest}" if rest else "")


def _comparison(rng: random.Random) -> str:
    a, b = _number(rng), _number(rng)
    return f"{a} {'<' if a < b else '>' if a > b else '='} {b}"


def _sequence(rng: random.Random) -> str:
    start, step = rng.randrange(100), rng.randrange(1, 13)
    return ", ".join(str(start + step * i) for i in range(8))


def _equation(rng: random.Random) -> str:
    factor, x, offset = rng.randrange(2, 13), rng.randrange(1, 50), rng.randrange(1, 100)
    right = factor * x + offset
    return f"{factor}x + {offset} = {right}; {factor}x = {right - offset}; x = {x}"


def _ordering(rng: random.Random) -> str:
    values = [_number(rng) for _ in range(6)]
    return f"{' '.join(map(str, values))} -> {' '.join(map(str, sorted(values)))}"


EXERCISES: dict[str, Callable[[random.Random], str]] = {
    "Sums": _sum,
    "Differences": _difference,
    "Products": _product,
    "Divisions": _division,
    "Comparisons": _comparison,
    "Sequences": _sequence,
    "Equations": _equation,
    "Ordering": _ordering,
}


def worksheets(seed: int, count: int) -> Iterator[str]:
    """Yield worksheets: a title and 30 exercises of one kind, or of all kinds mixed."""
    rng = random.Random(seed)
    for _ in range(count):
        title = rng.choice([*EXERCISES, "Mixed"])
        kinds = list(EXERCISES.values()) if title == "Mixed" else [EXERCISES[title]]
        yield "\n".join([title, *(rng.choice(kinds)(rng) for _ in range(30))])
