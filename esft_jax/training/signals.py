"""Signals that a training loop reads between steps, and what they do outside of it."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Signals that came while no `stop_signal` was active, perhaps just before one began.
_early: list[int] = []
_EXIT_CODES: dict[int, int] = {signal.SIGTERM: 0, signal.SIGINT: 130}


@contextmanager
def stop_signal() -> Iterator[Callable[[], int | None]]:
    """Turn SIGTERM (schedulers, preemption) and SIGINT into a flag that stays set: the signal.

    A SIGINT that is not the first raises `KeyboardInterrupt`. Signals reach the main thread only;
    elsewhere the flag stays None.
    """
    received: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(signum)

    with _handled(note, signal.SIGTERM, signal.SIGINT):
        yield lambda: next(iter(received + _early), None)


@contextmanager
def exit_on_signals(say: Callable[[str], None]) -> Iterator[None]:
    """Have signals end the process at once: while nothing else handles them, and a second SIGINT.

    SIGTERM ends it with code 0, SIGINT with 130. That is for loading, scoring, compiling and
    evaluating: what they write is atomic, and there is nothing to save. A second SIGINT does not
    wait for what the first one began. Python sees signals between two of its own instructions
    only, and a compilation is one; so a thread is told of them. Nor would a `KeyboardInterrupt` do:
    raised in a callback of the garbage collector, as JAX has one, it is lost.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def idle(signum: int, frame: Any) -> None:
        # The thread may come when another handler is in place already.
        _early.append(signum)

    def watch() -> None:
        interrupted = False
        while received := reader.recv(1):
            number = received[0]
            if number == signal.SIGINT and interrupted:
                os._exit(_EXIT_CODES[number])
            interrupted |= number == signal.SIGINT
            if number in _EXIT_CODES and signal.getsignal(number) is idle:
                say("Stopped outside of training; the same command goes on.")
                os._exit(_EXIT_CODES[number])

    reader, writer = socket.socketpair()
    with writer, _handled(idle, *_EXIT_CODES):
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            _early.clear()


@contextmanager
def on_user_signal(act: Callable[[], None]) -> Iterator[None]:
    """Call a function at each SIGUSR1."""
    with _handled(lambda signum, frame: act(), signal.SIGUSR1):
        yield


@contextmanager
def _handled(handler: Callable[[int, Any], None], *numbers: int) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
