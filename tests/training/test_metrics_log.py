"""What a resumed run finds in the metrics file of the run that was stopped."""

import json
import time
from pathlib import Path

from esft_jax.training.metrics import peak_memory
from esft_jax.training.metrics_log import MetricsLog
from esft_jax.training.run_folder import RunFolder


def test_lines_past_the_checkpoint_and_a_cut_off_one_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3, 4)]
    folder.metrics.write_text("".join(lines) + '{"step": 5, "lo')
    with MetricsLog(folder, start=2, steps=6) as log:
        log.write(3, {"train/loss": 0.5})
    *found, last = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    # What an older version wrote has the names of today.
    assert found == [{"step": 1, "train/loss": 1.0}, {"step": 2, "train/loss": 1.0}]
    assert abs(last.pop("time") - time.time()) < 60
    assert last == {"step": 3, "train/loss": 0.5}


def test_peak_memory_is_in_bytes() -> None:
    assert peak_memory() > 50e6  # this process with JAX in it
