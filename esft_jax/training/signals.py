"""Signals that a training loop reads between steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_signal() -> Iterator[Callable[[], bool]]:
    """Turn SIGTERM (schedulers, preemption) and SIGINT into a flag that stays set.

    A second SIGINT interrupts at once. Signals reach the main thread only; elsewhere the flag
    stays unset.
    """
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(signum)

    with _handled(note, signal.SIGTERM, signal.SIGINT):
        yield lambda: bool(received)


@contextmanager
def on_user_signal(act: Callable[[], None]) -> Iterator[None]:
    """Call a function at each SIGUSR1."""
    with _handled(lambda signum, frame: act(), signal.SIGUSR1):
        yield


@contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
