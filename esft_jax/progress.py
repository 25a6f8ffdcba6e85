"""How far a long stage is, and how long it will still take."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import jax
from tqdm import tqdm

Item = TypeVar("Item")
# Receives how many units more are done.
Advance = Callable[[int], None]

# Seconds between two lines where there is no terminal.
_EVERY = 30
# What a run of many days has to say fits in 80 columns.
_BAR = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"


class Progress:
    """A bar on terminals; elsewhere a line every half minute. Process 0 alone shows any.

    Args:
        what: is done, in a word or two.
        total: units of all that is to be done.
        initial: of these, what was done before.
        unit: `B` for bytes; else what is counted is obvious from `what`.
        leave: the bar stays when all is done.
        lines: write the lines; else their writer asks for `left`.
        shown: show any of it.
    """

    def __init__(
        self,
        what: str,
        total: int,
        *,
        initial: int = 0,
        unit: str = "",
        leave: bool = True,
        lines: bool = True,
        shown: bool = True,
    ):
        shown = shown and jax.process_index() == 0
        self._bar = tqdm(
            desc=what,
            total=total,
            initial=initial,
            unit_scale=unit == "B",
            leave=leave,
            disable=None if shown else True,  # None: shown on terminals only
            dynamic_ncols=True,
            bar_format=_BAR,
        )
        self._what, self._total, self._unit = what, total, unit
        self._initial = self._done = initial
        self.on_terminal = not self._bar.disable
        self._lines = lines and shown and not self.on_terminal
        self._begin = self._said = time.monotonic()

    def advance(self, units: int = 1) -> None:
        """More units are done."""
        self._done += units
        self._bar.update(units)
        if self._lines and time.monotonic() - self._said >= _EVERY:
            self._said = time.monotonic()
            done, total = (self._counted(units) for units in (self._done, self._total))
            print(f"{self._what}: {done} of {total}, {self.left} left", file=sys.stderr, flush=True)

    def _counted(self, units: int) -> str:
        return f"{with_prefix(units)}B" if self._unit == "B" else str(units)

    @property
    def left(self) -> str:
        """An estimate of the time until all is done, `[H:]MM:SS`, by the pace so far."""
        return time_left(
            time.monotonic() - self._begin, self._done - self._initial, self._total - self._done
        )

    def show(self, text: str) -> None:
        """Write a text behind the bar."""
        self._bar.set_postfix_str(text)

    def close(self) -> None:
        """All is done, or nothing more will be."""
        self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def progress_over(
    items: Iterable[Item], what: str, total: int, *, leave: bool = True
) -> Iterator[Item]:
    """The same items; shows how many of them are done."""
    with Progress(what, total, leave=leave) as progress:
        for item in items:
            yield item
            progress.advance()


def with_prefix(number: float) -> str:
    """A number in three digits, with a prefix of the SI: 12.3k."""
    return tqdm.format_sizeof(number)


def time_left(seconds: float, done: int, left: int) -> str:
    """An estimate, `[H:]MM:SS`, of the time that what is left takes; ? if nothing is done.

    Args:
        seconds: that what is done took.
    """
    return tqdm.format_interval(seconds * left / done) if done else "?"
