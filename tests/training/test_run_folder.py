"""What of a run folder is checked before a run goes on in it."""

import dataclasses
import time
from pathlib import Path

import pytest

from esft_jax.config import RunConfig, load_config
from esft_jax.errors import InputError
from esft_jax.training.run_folder import RunFolder


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """Of a run that has begun."""
    config = RunConfig(
        model="m", output=str(tmp_path), data={"train": ("t.jsonl",)}, train={"steps": 4}
    )
    RunFolder(tmp_path).create(config)
    return config


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def test_fewer_steps_than_done_are_refused(config: RunConfig) -> None:
    run = RunFolder(config.output)
    for name in ("2", "4", "5.orbax-checkpoint-tmp"):
        (run.last / name).mkdir(parents=True)
    assert run.last_step() == 4
    run.check(config)  # finishing again
    run.check(with_steps(config, 9))
    with pytest.raises(InputError, match=r"train.steps: 3; the run in .* has made 4 updates"):
        run.check(with_steps(config, 3))


def test_a_configuration_is_replaced_once_the_run_goes_on_with_it(config: RunConfig) -> None:
    run, more = RunFolder(config.output), with_steps(config, 9)
    run.create(more)
    assert load_config(run.config) == config
    run.keep(more)
    assert load_config(run.config) == more


DAMAGED = b"", b"soon", b"nan", b"inf", b"-1", b"0", b"1e300", b"1 2", b"[]", b"\xff", b"9" * 5000


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_start_is_named(config: RunConfig, content: bytes) -> None:
    run = RunFolder(config.output)
    run.check(config)
    assert 0 <= time.time() - run.begun() < 60
    run.started.write_bytes(content)
    with pytest.raises(InputError, match=r"started: ") as caught:
        run.check(config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON"),
        (b"[]", "is .*; expected an object"),
        (b"\xff", "byte 0 of the line is not UTF-8"),
        (b'{"loss": 1.0}', "step: is None; expected a valid integer"),
        (b'{"step": "2"}', "step: is '2'"),
        (b'{"step": 2.5}', "step: is 2.5"),
        (b'{"step": true}', "step: is True"),
        (b'{"step": 2, "loss": NaN}', "loss: is nan; expected a finite number"),
        (b'{"step": 2, "loss": "low"}', "loss: is 'low'"),
        (b'{"step": 2, "step": 3}', "key 'step' appears twice"),
    ],
)
def test_a_damaged_line_of_metrics_is_named(config: RunConfig, line: bytes, message: str) -> None:
    run = RunFolder(config.output)
    run.metrics.write_bytes(b'{"step": 1, "loss": 1.5}\n' + line + b'\n{"step": 3}\n')
    with pytest.raises(InputError, match=f"metrics.jsonl:2: {message}"):
        run.check(config)
    run.metrics.write_bytes(b'{"step": 1, "loss": 1.5}\n' + line)  # what a crash leaves
    run.check(config)
    assert list(run.logged()) == [{"step": 1, "train/loss": 1.5}]
