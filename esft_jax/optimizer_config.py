"""The section `optimizer` of a configuration."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from esft_jax.adapt.parts import RATE_PARTS, RatePart, known_part
from esft_jax.values import CountOrZero, Decay, Fraction, NonNegative, Positive, Share

Schedule = Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"]
OptimizerName = Literal["adamw", "adafactor", "lion", "muon", "sgd"]
# What each optimizer reads besides what all do, and its own defaults.
OPTIMIZER_KEYS: dict[OptimizerName, dict[str, float]] = {
    "adamw": {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8},
    "adafactor": {},
    "lion": {"beta1": 0.9, "beta2": 0.99},
    "muon": {"momentum": 0.95, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8},
    "sgd": {"momentum": 0.9},
}


def _known_rate(name: object) -> object:
    return known_part(name, RATE_PARTS)


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class OptimizerConfig:
    """The optimizer, what it keeps, and its learning rate schedule.

    Of `beta1`, `beta2`, `epsilon` and `momentum`, those that the optimizer does not read are None;
    the others have defaults of its own (`OPTIMIZER_KEYS`).

    Attributes:
        name: AdamW, Adafactor (without a first moment), Lion, Muon (AdamW for vectors, embedding
            and head), or SGD.
        moments: Type that moments are kept in between updates; computed in float32, and rounded to
            bfloat16 stochastically.
        masters: Type that tuned matrices are kept in; rounded likewise.
        learning_rate: Peak learning rate.
        rates: Peak learning rates of parts that have their own: the names of `select.also`, and
            `experts`. Where two name a parameter, the narrower one counts.
        schedule: What follows the warm-up: `constant`; `linear` or `cosine` decay to the last step;
            `wsd`, constant and then a linear decay; `inverse_sqrt`, the peak times the root of the
            warm-up's updates over those made.
        warmup_steps: Updates over which the learning rate rises linearly from 0.
        warmup_share: The same as a share of all steps, instead.
        decay_share: Share of all steps over which `wsd` decays, the last ones; None elsewhere.
        final_lr_fraction: Learning rate after a decay, as a fraction of the peak.
        beta1: Decay of the first moment; of Lion, in the update.
        beta2: Decay of the second moment; of Lion, of the only one.
        epsilon: Added to the root of the second moment.
        momentum: Decay of the only moment, of SGD and of Muon's matrices; of SGD, 0 keeps none.
        weight_decay: Decoupled weight decay, multiplied by the learning rate.
        clip_norm: Largest global norm of the gradients of all trained parameters.
    """

    name: OptimizerName = "adamw"
    moments: Literal["float32", "bfloat16"] = "float32"
    masters: Literal["float32", "bfloat16"] = "float32"
    learning_rate: Positive = 1e-5
    rates: dict[Annotated[RatePart, BeforeValidator(_known_rate)], Positive] = field(
        default_factory=dict
    )
    schedule: Schedule = "constant"
    warmup_steps: CountOrZero = 0
    warmup_share: Fraction | None = None
    decay_share: Share | None = None
    final_lr_fraction: Fraction = 0.1
    # Those of AdamW: what runs depend on is told apart by what differs from the defaults.
    beta1: Decay | None = 0.9
    beta2: Decay | None = 0.95
    epsilon: Positive | None = 1e-8
    momentum: Decay | None = None
    weight_decay: NonNegative = 0.1
    clip_norm: Positive = 1.0

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Give what is not said the optimizer's default: none for what it does not read."""
        given = values.kwargs or {} if isinstance(values, ArgsKwargs) else values
        if not isinstance(given, dict):
            return values
        named = given.get("name", "adamw")  # checked later
        defaults = next((keys for name, keys in OPTIMIZER_KEYS.items() if name == named), {})
        keys = ("beta1", "beta2", "epsilon", "momentum")
        absent = {key: defaults.get(key) for key in keys if given.get(key) is None}
        if given.get("decay_share") is None:
            absent["decay_share"] = 0.2 if given.get("schedule") == "wsd" else None
        filled = given | absent
        return ArgsKwargs(values.args, filled) if isinstance(values, ArgsKwargs) else filled

    def problem(self) -> str | None:
        """What does not fit together, starting with the key to change."""
        read = OPTIMIZER_KEYS[self.name]
        for key in ("beta1", "beta2", "epsilon", "momentum"):
            if getattr(self, key) is not None and key not in read:
                others = ", ".join(name for name, keys in OPTIMIZER_KEYS.items() if key in keys)
                return f"{key}: {self.name} reads none ({others} would); expected null"
        if self.name == "sgd" and not self.momentum and self.moments != "float32":
            return f"moments: sgd without momentum has none to keep in {self.moments}"
        if self.warmup_share is not None and self.warmup_steps:
            return "warmup_share: warmup_steps is set too; expected one of them"
        if self.decay_share is not None and self.schedule != "wsd":
            return f"decay_share: {self.schedule} reads none (wsd would); expected null"
        return None

    def schedule_problem(self, steps: int) -> str | None:
        """What does not fit into a number of steps, starting with the key to change."""
        warmup, decay = self.warmup(steps), self.decay(steps)
        if self.warmup_steps > steps:
            return (
                f"warmup_steps: {warmup} is more than train.steps = {steps}; expected at most that"
            )
        if warmup + decay > steps:
            return (
                f"decay_share: {decay} updates, after {warmup} of the warm-up, are more than "
                f"train.steps = {steps}; expected a smaller share"
            )
        if self.schedule == "inverse_sqrt" and not warmup:
            return (
                "schedule: inverse_sqrt falls by the updates of the warm-up; expected warmup_steps "
                "or warmup_share"
            )
        return None

    def warmup(self, steps: int) -> int:
        """Updates of the warm-up of a run with this number of steps."""
        return self.warmup_steps or round((self.warmup_share or 0) * steps)

    def decay(self, steps: int) -> int:
        """Updates of the decay of `wsd`; 0 for other schedules."""
        return 0 if self.decay_share is None else max(round(self.decay_share * steps), 1)
