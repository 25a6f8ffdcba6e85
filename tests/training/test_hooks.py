"""What a caller of a run may bring along: functions to call, an optimizer, a loss."""

import json
from pathlib import Path

import numpy as np
import optax
import pytest

from esft_jax.config import RunConfig
from esft_jax.errors import Diverged, InputError
from esft_jax.training.hooks import Hook, StepInfo
from esft_jax.training.loop import run_training
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.setup import open_setup
from esft_jax.training.step import token_loss


@pytest.fixture
def make_given(make_config, tmp_path: Path):
    """Configurations that train a given expert for a few steps."""
    (tmp_path / "cfg.json").write_text(json.dumps({"experts": {"1": [0]}}))
    train = {"steps": 4, "batch_size": 4, "log_every": 2, "eval_every": 4, "save_every": 4}

    def make(steps: int = 4, **changes) -> RunConfig:
        given = {"expert_cfg": str(tmp_path / "cfg.json"), "mesh": {"data": 1}}
        return make_config(**given | {"train": train | {"steps": steps}} | changes)

    return make


def run(config: RunConfig, say=lambda text: None, **options):
    return run_training(open_setup(config), say, **options)


def test_hooks_are_called_when_due_with_what_the_run_writes(make_given) -> None:
    config = make_given()
    logged: list[dict] = []
    banks: dict[int, np.ndarray] = {}

    def keep(done: StepInfo) -> None:
        assert done.steps == 4 and int(done.state.step) == done.step
        banks[done.step] = np.asarray(done.model.tuned_experts.down[...])
        assert float(done.metrics["loss"]) > 0

    every: list[int] = []
    run(
        config,
        on_log=lambda step, metrics: logged.append({"step": step, **metrics}),
        on_eval=lambda step, losses: logged.append({"step": step, **losses}),
        hooks=[Hook(keep, every=3), Hook(lambda done: every.append(done.step))],
    )
    lines = [line for line in RunFolder(config.output).logged() if line.pop("time")]
    assert logged == lines
    assert [line["step"] for line in logged] == [0, 2, 4, 4] and "valid/loss" in logged[-1]
    assert list(banks) == [3] and every == [1, 2, 3, 4]


@pytest.mark.parametrize("every", [0, -1, 1.5, True, None])
def test_a_hook_is_called_after_whole_steps(every) -> None:
    with pytest.raises(InputError, match=r"every: .*; expected a whole number of steps"):
        Hook(print, every=every)


def test_own_optimizers_and_losses_are_what_is_trained_evaluated_and_resumed(make_given) -> None:
    def doubled(model, batch):
        total, weight = token_loss(model, batch)
        return 2 * total, weight

    said: list[str] = []
    two, four = make_given(2), make_given(4)
    plain = run(make_given(2, output=two.output + "-plain"))
    # Nothing learns, so both losses are those of the base.
    still = {"optimizer": optax.sgd(0.0, momentum=0.9), "loss": doubled}
    result = run(two, said.append, **still)
    base = next(RunFolder(plain.folder).logged())["valid/loss"]
    lines = list(RunFolder(two.output).logged())
    assert lines[-1]["valid/loss"] == result.valid_loss > plain.valid_loss
    assert lines[0]["valid/loss"] == pytest.approx(2 * base)
    assert lines[1]["train/loss"] == pytest.approx(2 * base, rel=0.1)
    assert lines[1]["train/loss_weight"] > 0
    assert not any("train/learning_rate" in line for line in lines)
    assert [text for text in said if text.startswith("optimizer: the caller's own")]

    other = {"optimizer": optax.adam(1e-3), "loss": doubled}
    message = r"checkpoint of step 2 has optimizer_state = '.*TraceState.*'; .*ScaleByAdamState.*'"
    with pytest.raises(InputError, match=message):
        run(four, **other)
    with pytest.raises(InputError, match="optimizer_state = .*TraceState.*; this run has .*Adam"):
        run(four, loss=doubled)
    with pytest.raises(InputError, match="has loss = '.*doubled'; this run has 'token_loss'"):
        run(four, optimizer=still["optimizer"])
    assert run(four, **still).step in (2, 4)  # equally good
    assert max(line["step"] for line in RunFolder(four.output).logged()) == 4


def test_a_hook_that_fails_ends_the_run_which_goes_on_later(make_given) -> None:
    config = make_given()

    def fail(done: StepInfo) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(config, hooks=[Hook(fail, every=4)])
    steps: list[int] = []
    assert run(config, hooks=[Hook(lambda done: steps.append(done.step))]).step == 4
    assert steps == []  # its checkpoint was written before


def test_an_own_loss_beside_a_balance_loss_is_refused(make_given) -> None:
    train = {"steps": 2, "batch_size": 4, "balance_loss": 0.1}
    config = make_given(method="full", expert_cfg=None, train=train)
    with pytest.raises(InputError, match=r"train.balance_loss: 0.1 beside an own loss; expected 0"):
        run(config, loss=lambda model, batch: token_loss(model, batch))


def test_a_validation_loss_without_weight_ends_the_run(make_given) -> None:
    def weightless(model, batch):
        total, weight = token_loss(model, batch)
        return total, 0 * weight

    with pytest.raises(Diverged, match="validation loss is nan"):
        run(make_given(2), loss=weightless)
