"""The section `train` of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict
from pydantic.dataclasses import dataclass

from esft_jax.values import Count, CountOrZero, Flag, NonNegative, Positive

LoggerName = Literal["tensorboard", "wandb", "trackio", "mlflow"]


def _distinct(names: tuple[LoggerName, ...]) -> tuple[LoggerName, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"one is named twice in {', '.join(names)}")
    return names


_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class EarlyStoppingConfig:
    """When a run ends before its last step, since the validation loss falls no longer.

    Attributes:
        patience: Evaluations in a row without a lower loss; none trains to the last step.
        min_delta: Nats per token by which a loss must be lower to count.
    """

    patience: Count | None = None
    min_delta: NonNegative = 0.0


@dataclass(frozen=True, config=_STRICT)
class TrainConfig:
    """The training loop.

    Attributes:
        steps: Optimizer updates.
        epochs: Passes over `data.train`, instead of `steps`, which are counted once the data are
            read; with `data.mix`, what is mixed in comes on top.
        batch_size: Packed rows per update, over all devices and micro-batches.
        micro_batches: Parts of a batch whose gradients are accumulated one after the other.
        eval_every: Updates between two evaluation losses.
        early_stopping: When to end before the last step.
        save_every: Updates between two checkpoints.
        keep_checkpoints: Checkpoints to resume from that are kept; the oldest is deleted first.
        log_every: Updates between two lines of metrics.
        log_to: What gets the metrics besides `metrics.jsonl`.
        max_skipped: Updates that may be skipped, since their loss or gradients are not finite,
            before the run stops.
        balance_loss: Weight of the router's load-balancing loss; only with `method: full`.
        remat: What is rematerialised in the backward pass, from nothing (`none`) to whole layers
            (`full`); between them, memory falls from `dots` over `experts` to `attention`.
            `offload` is `full` with the inputs of layers kept in the memory of the host.
        profile_step: First update of a profiler trace; 0 makes none.
        profile_steps: Updates in a trace, of this one and of those asked for by SIGUSR1.
        verify_frozen: Check after training that every frozen weight kept its bits.
    """

    steps: Count = 500
    epochs: Positive | None = None
    batch_size: Count = 32
    micro_batches: Count = 1
    eval_every: Count = 100
    early_stopping: EarlyStoppingConfig = EarlyStoppingConfig()
    save_every: Count = 100
    keep_checkpoints: Count = 2
    log_every: Count = 10
    log_to: Annotated[tuple[LoggerName, ...], AfterValidator(_distinct)] = ("tensorboard",)
    max_skipped: CountOrZero = 10
    balance_loss: NonNegative = 0.0
    remat: Literal["none", "dots", "experts", "attention", "full", "offload"] = "none"
    profile_step: CountOrZero = 0
    profile_steps: Count = 3
    verify_frozen: Flag = False

    def problem(self) -> str | None:
        """What does not fit together, starting with the key to change."""
        if self.batch_size % self.micro_batches:
            return (
                f"micro_batches: {self.micro_batches} equal parts do not make up a batch;"
                f" expected a divisor of train.batch_size = {self.batch_size}"
            )
        if self.epochs is not None and self.steps != TrainConfig.steps:
            return (
                f"steps: {self.steps} beside train.epochs = {self.epochs:g}; expected one of them "
                "(train.epochs: null takes epochs away)"
            )
        stopping = self.early_stopping
        if stopping.patience is None and stopping.min_delta:
            return "early_stopping.min_delta: patience is not set; expected both, or neither"
        return None
