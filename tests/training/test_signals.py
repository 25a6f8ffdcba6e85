"""A signal is not lost between two handlers."""

import os
import signal

from esft_jax.training import signals


def test_a_signal_just_before_training_stops_it(monkeypatch) -> None:
    said: list[str] = []
    # The thread that ends the process comes too late: another handler is in place by then.
    monkeypatch.setattr(signals.signal, "getsignal", lambda number: None)
    with signals.exit_on_signals(said.append):
        os.kill(os.getpid(), signal.SIGTERM)
        with signals.stop_signal() as stopped:
            assert stopped()
    with signals.exit_on_signals(said.append), signals.stop_signal() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
    assert not said
