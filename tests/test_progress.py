"""Progress of long stages, with a terminal and without."""

import fcntl
import io
import os
import re
import struct
import sys
import termios
from contextlib import suppress

import pytest

from esft_jax import progress
from esft_jax.checkpoint import load, source
from esft_jax.checkpoint.load import load_base
from esft_jax.ops.quantisation import Quantisation
from esft_jax.progress import Progress, progress_over, time_left
from esft_jax.sharding import make_mesh
from esft_jax.terminal import first_line
from esft_jax.training.metrics_log import MetricsLog
from esft_jax.training.run_folder import RunFolder


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Seconds, which the test moves on."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_it_is_a_line_every_half_minute(clock, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    for _ in progress_over(range(12), "score", 12):
        clock[0] += 10
    with Progress("load", 5_000_000_000, unit="B") as bar:
        clock[0] += 3600
        bar.advance(1_000_000_000)
    assert sys.stderr.getvalue().splitlines() == [
        "score: 3 of 12, 01:30 left",
        "score: 6 of 12, 01:00 left",
        "score: 9 of 12, 00:30 left",
        "score: 12 of 12, 00:00 left",
        "load: 1.00GB of 5.00GB, 4:00:00 left",
    ]


@pytest.mark.parametrize("options", [{"shown": False}, {"lines": False}])
def test_lines_can_be_left_to_others(clock, monkeypatch, options) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with Progress("train", 100, initial=20, **options) as bar:
        assert bar.left == "?"
        clock[0] += 60
        bar.advance(20)
        assert bar.left == "03:00"  # what was done before took no time
    assert not sys.stderr.getvalue()


def test_a_bar_with_all_that_it_says_fits_80_columns(tmp_path, monkeypatch) -> None:
    master, terminal = os.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    monkeypatch.setattr(sys, "stderr", os.fdopen(terminal, "w"))
    folder = RunFolder(tmp_path)
    with MetricsLog(folder, 123_455, 1_000_000) as log:
        log.advance()
        scalars = {"train/loss": 1.234567, "valid/loss": 12.34567, "speed/mfu": 0.5}
        log.write(123_456, scalars | {"speed/tokens_per_second": 987_654.3})
    sys.stderr.close()
    written = b""
    with suppress(OSError):  # which says that there is no more
        while part := os.read(master, 1 << 16):
            written += part
    os.close(master)
    drawn = written.decode().replace("\n", "\r").split("\r")
    assert max(map(len, drawn)) <= 80
    *_, last = filter(str.strip, drawn)
    assert last.startswith("train 123456/1000000 |")
    assert last.endswith(" left, loss 1.235, valid 12.35, 988k tokens/s")


@pytest.mark.parametrize("quantisation", [None, Quantisation("int8", "int8", 16)])
def test_loading_counts_every_byte_that_a_process_reads(base, monkeypatch, quantisation) -> None:
    counted: dict[str, tuple[int, int]] = {}

    class Counted(Progress):
        def __init__(self, what: str, total: int, **options) -> None:
            super().__init__(what, total, **options)
            counted[what] = total, 0

        def advance(self, units: int = 1) -> None:
            total, done = counted[self._what]
            counted[self._what] = total, done + units

    monkeypatch.setattr(load, "Progress", Counted)
    monkeypatch.setattr(source, "Progress", Counted)
    assert load_base(base, mesh=make_mesh(2, 4), quantisation=quantisation).fingerprint
    assert counted.keys() == {"load", "hash"}
    for total, done in counted.values():
        assert 0 < done == total


def test_a_command_begins_with_versions_devices_type_and_what_it_does() -> None:
    line = first_line("train x by esft", "bfloat16")
    assert re.fullmatch(r"esft-jax \S+, JAX [\d.]+, 8 x cpu, bfloat16: train x by esft", line)


def test_time_left_is_by_the_pace_so_far() -> None:
    assert time_left(90, 3, 6) == "03:00"
    assert time_left(90, 0, 6) == "?"
