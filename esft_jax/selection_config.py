"""The sections `score` and `select` of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BeforeValidator, ConfigDict, model_validator
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from esft_jax.adapt.parts import FLAGS, Part, known_part, merge_flags, ordered
from esft_jax.values import Count, FormatName, Length, LocalPath, Seed, Share, Size

# Scores that are measured only where they are asked for.
FurtherMethod = Literal["contribution", "contrast", "gate_taylor", "random"]
ScoreMethod = Literal["token", "gate", "gate_share", FurtherMethod]
FURTHER_METHODS: tuple[FurtherMethod, ...] = get_args(FurtherMethod)
# The paper's choices for its two scores. By gate share, 0.1 takes about 2 of 128 experts.
DEFAULT_TOP_P: dict[ScoreMethod, float] = {
    "token": 0.2,
    "gate": 0.1,
    "gate_share": 0.2,
    "contribution": 0.2,
    "contrast": 0.2,
    "gate_taylor": 0.2,
    "random": 0.2,
}
Allocation = Literal["global", "uniform", "top_p"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ScoreConfig:
    """How expert relevance is measured.

    Attributes:
        samples: Packed rows to run, at most; fewer if the data holds fewer.
        sequence_length: Tokens per packed row.
        batch_size: Rows per forward pass, over all devices; rounded up to a multiple of them.
        methods: Scores to measure besides those of the routing and that of `select.method`, to
            compare them: some of `contribution`, `contrast`, `gate_taylor`, `random`.
        general: Files of a general sample, which `contrast` compares the task with; as many rows
            are run.
        general_format: Of `general`, as `data.format`.
    """

    samples: Count = 32
    sequence_length: Length = 4096
    batch_size: Count = 4
    methods: tuple[FurtherMethod, ...] = ()
    general: tuple[LocalPath, ...] = ()
    general_format: FormatName | None = None


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class SelectConfig:
    """Which experts are trained.

    At most one of `top_p`, `top_k`, `max_parameters` and `max_bytes` is set; without any, `top_p`
    is `DEFAULT_TOP_P` of the method.

    Attributes:
        method: Relevance score: `token` (share of the routed tokens), `gate` (mean gate, of routers
            that do not renormalise), `gate_share` (mean share of a token's gates, of all),
            `contribution` (norm of what an expert adds), `contrast` (share of the routed tokens
            over that in a general sample), `gate_taylor` (gate times the loss's derivative by it),
            or `random` (by the run's seed).
        top_p: Share of a layer's relevance its chosen experts reach together.
        top_k: Experts in every layer.
        max_parameters: Trained parameters, at most.
        max_bytes: The same, as bytes of the adapter's tensors.
        allocation: How a budget is divided among layers: `global` takes the best experts of all,
            `uniform` as many in each, `top_p` those of the largest p that the budget allows.
        group_size: Experts that are selected together, grouped by the tokens they share.
        groups_from: Scores or routing logs to group by, such as those of alignment data; none
            takes the scores that are selected by.
        scores: Scores or expert configurations of one or several tasks, instead of measuring.
        combine: What to train of the experts that several tasks select.
        random_seed: Train as many random experts in each layer instead, as a control.
        also: What else is trained: some of `shared_experts`, `router`, `attention`, `norms`,
            `dense_mlps`, `embedding`, `head`; `non_expert_modules` is all of these but the first.
    """

    method: ScoreMethod = "token"
    top_p: Share | None = None
    top_k: Count | None = None
    max_parameters: Size | None = None
    max_bytes: Size | None = None
    allocation: Allocation = "global"
    group_size: Count = 1
    groups_from: LocalPath | None = None
    scores: tuple[LocalPath, ...] = ()
    combine: Literal["union", "intersection"] = "union"
    random_seed: Seed | None = None
    also: Annotated[
        tuple[Annotated[Part, BeforeValidator(known_part)], ...], AfterValidator(ordered)
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _read_flags(cls, values: Any) -> Any:
        """Accept the two flags that `also` has replaced: run folders have them."""
        given = values.kwargs if isinstance(values, ArgsKwargs) else values
        if not isinstance(given, dict):
            return values
        flags: dict[str, Any] = {flag: given[flag] for flag in FLAGS if flag in given}
        also = given.get("also", ())
        if not flags or not isinstance(also, list | tuple):
            return values
        rest = {key: value for key, value in given.items() if key not in flags}
        rest["also"] = merge_flags(also, flags)
        return ArgsKwargs(values.args, rest) if isinstance(values, ArgsKwargs) else rest

    @property
    def has_rule(self) -> bool:
        """Whether one of the four rules is set."""
        return bool(self._rules)

    @property
    def threshold(self) -> float | None:
        """`top_p`; without any rule the value of `DEFAULT_TOP_P`."""
        return self.top_p if self.has_rule else DEFAULT_TOP_P[self.method]

    def problem(self) -> str | None:
        """What does not fit together, starting with the key to change."""
        rules = self._rules
        if len(rules) > 1:
            return f"{rules[1]}: {rules[0]} is set too; expected one of them"
        if (
            len(self.scores) > 1
            and self.combine == "union"
            and rules in (["max_parameters"], ["max_bytes"])
        ):
            return f"{rules[0]}: the union of several tasks would exceed it; expected one task"
        if self.allocation != "global" and rules not in (["max_parameters"], ["max_bytes"]):
            return "allocation: there is no budget to divide; expected max_parameters or max_bytes"
        if self.groups_from is not None and self.group_size == 1:
            return "groups_from: group_size is 1; expected a larger one"
        if self.group_size > 1 and len(self.scores) > 1 and self.groups_from is None:
            return "groups_from: each task would have its own groups; expected scores to group by"
        if self.top_k is not None and self.top_k % self.group_size:
            return f"top_k: {self.top_k} is no multiple of group_size = {self.group_size}"
        return None

    @property
    def _rules(self) -> list[str]:
        names = ("top_p", "top_k", "max_parameters", "max_bytes")
        return [name for name in names if getattr(self, name) is not None]
