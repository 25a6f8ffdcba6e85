"""Signals that a training loop reads between steps, and what they do outside of it."""

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# SIGTERM was seen where nobody read flags, perhaps just before somebody does (`exit_on_signals`).
_terminated = threading.Event()


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
        yield lambda: received[0] if received else signal.SIGTERM if _terminated.is_set() else None


@contextmanager
def exit_on_signals(say: Callable[[str], None]) -> Iterator[None]:
    """Have SIGTERM, while nothing else handles it, and a second SIGINT end the process at once.

    SIGTERM ends it with code 0. That is for loading, scoring, compiling and evaluating: what they
    write is atomic, and there is nothing to save. A second SIGINT does not wait for what the first
    one began, and ends it with code 130. Python sees signals between two of its own instructions
    only, and a compilation is one; so a thread is told of them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def idle(signum: int, frame: Any) -> None:
        # The thread may come when another handler is in place already.
        _terminated.set()

    def watch() -> None:
        interrupted = False
        while received := reader.recv(1):
            if received[0] == signal.SIGINT:
                if interrupted:
                    os._exit(130)
                interrupted = True
            if received[0] == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is idle:
                say("Stopped outside of training; the same command goes on.")
                os._exit(0)

    reader, writer = socket.socketpair()
    with writer, _handled(idle, signal.SIGTERM):
        writer.setblocking(False)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=watch, daemon=True).start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(before)
            _terminated.clear()


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
