"""A signal is not lost between two handlers."""

import os
import signal
import subprocess
import sys

import pytest

from esft_jax.training import signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_just_before_training_stops_it(monkeypatch, number: signal.Signals) -> None:
    said: list[str] = []
    # The thread that ends the process comes too late: another handler is in place by then.
    monkeypatch.setattr(signals.signal, "getsignal", lambda number: None)
    with signals.exit_on_signals(said.append):
        os.kill(os.getpid(), number)
        with signals.stop_signal() as stopped:
            assert stopped() == number
    with signals.exit_on_signals(said.append), signals.stop_signal() as stopped:
        assert not stopped()
        os.kill(os.getpid(), number)
        assert stopped() == number
    assert not said


COLLECTING = """
import gc, os, signal, sys, time
from esft_jax.training.signals import exit_on_signals

def interrupt(phase, info):  # where Python drops a `KeyboardInterrupt`, as in JAX's callback
    if phase == "start":
        os.kill(os.getpid(), signal.SIGINT)

with exit_on_signals(print):
    gc.callbacks.append(interrupt)
    gc.collect()
    gc.callbacks.clear()
    time.sleep(10)
"""


def test_an_interrupt_during_a_collection_is_not_lost() -> None:
    done = subprocess.run([sys.executable, "-c", COLLECTING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, "")
