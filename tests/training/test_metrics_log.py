"""What a resumed run finds in the metrics file of the run that was stopped."""

import json
from pathlib import Path

from esft_jax.training.metrics_log import MetricsLog, peak_memory
from esft_jax.training.run_folder import RunFolder


def test_lines_past_the_checkpoint_and_a_cut_off_one_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in (1, 2, 3, 4)]
    folder.metrics.write_text("".join(lines) + '{"step": 5, "lo')
    with MetricsLog(folder, start=2, steps=6) as log:
        log.write(3, {"loss": 0.5})
    found = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert found == [
        {"step": 1, "loss": 1.0},
        {"step": 2, "loss": 1.0},
        {"step": 3, "loss": 0.5},
    ]


def test_peak_memory_is_in_bytes() -> None:
    assert peak_memory() > 50e6  # this process with JAX in it
