"""Figures of several updates as one, and their names."""

import jax.numpy as jnp
import numpy as np
import pytest

from esft_jax.training.metrics import Interval, grouped, speed_of


def test_losses_are_means_over_the_tokens_of_all_updates_since_the_last_line() -> None:
    interval = Interval()
    updates = (
        # loss, its tokens, that of a source, its tokens, gradient, skipped
        (2.0, 10.0, 3.0, 4.0, 1.0, 0),
        (4.0, 30.0, np.nan, 0.0, 2.0, 0),  # none of this source
        (np.nan, 20.0, 5.0, 4.0, np.inf, 1),
    )
    names = ("loss", "target_tokens", "loss/a", "target_tokens/a", "grad_norm", "skipped")
    for update in updates:
        interval.add(dict(zip(names, map(jnp.asarray, update), strict=True)))
    assert len(interval) == 3
    expected = (3.5, 60.0, 4.0, 8.0, 1.5, 1)
    assert interval.take() == dict(zip(names, expected, strict=True))

    # The next interval begins anew; a figure without any number is none.
    interval.add({"loss": jnp.asarray(1.0), "loss_weight": jnp.asarray(0.0)})
    found = interval.take()
    assert np.isnan(found["loss"]) and found["loss_weight"] == 0


def test_an_own_loss_is_weighted_by_its_weights() -> None:
    interval = Interval()
    for loss, weight in ((1.0, 1.0), (5.0, 3.0)):
        interval.add({"loss": jnp.asarray(loss), "loss_weight": jnp.asarray(weight)})
    assert interval.take() == {"loss": 4.0, "loss_weight": 4.0}


@pytest.mark.parametrize(
    ("before", "name"),
    [
        ("loss", "train/loss"),
        ("loss/other", "train/loss/other"),
        ("learning_rate/router", "train/learning_rate/router"),
        ("valid_loss", "valid/loss"),
        ("valid_target_tokens/task", "valid/target_tokens/task"),
        ("tokens_per_second_per_process", "speed/tokens_per_second_per_process"),
        ("step_seconds_p99", "speed/step_seconds_p99"),
        ("peak_memory_bytes", "speed/peak_memory_bytes"),
        ("mfu", "speed/mfu"),
        ("experts/entropy", "experts/entropy"),
        ("step", "step"),
    ],
)
def test_names_are_grouped(before: str, name: str) -> None:
    assert grouped(before) == grouped(grouped(before)) == name


def test_speed_is_that_of_all_updates_since_the_last_line() -> None:
    found = speed_of([0.5, 1.5], 0.5, tokens=256, flops=8.0, peak_flops=16.0)
    assert found["speed/tokens_per_second"] == 256
    assert found["speed/mfu"] == 0.5
    assert found["speed/input_seconds"] == 0.25
    assert (found["speed/step_seconds_p50"], found["speed/step_seconds_max"]) == (1.0, 1.5)
