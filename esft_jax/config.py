"""One run = one `RunConfig`: frozen, strictly checked, read from and written to one YAML file.

Relative paths in a configuration are relative to the working directory of the command, not to the
folder of the configuration file.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
)
from pydantic.dataclasses import dataclass

from esft_jax import strict_yaml
from esft_jax.adapt.lora import Target
from esft_jax.data.formats import check_columns
from esft_jax.data_config import DataConfig
from esft_jax.errors import InputError
from esft_jax.files import check_file
from esft_jax.ops.quantisation import Quantisation
from esft_jax.optimizer_config import OptimizerConfig
from esft_jax.selection_config import FURTHER_METHODS, FurtherMethod, ScoreConfig, SelectConfig
from esft_jax.train_config import TrainConfig
from esft_jax.values import (
    Count,
    FormatName,
    LocalPath,
    MetricName,
    Name,
    NonNegative,
    Positive,
    Seed,
    Share,
    Text,
    distinct_names,
)

Method = Literal["esft", "full", "lora"]


def _known_target(name: object) -> object:
    known = get_args(Target)
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
        raise ValueError(
            f"unknown target {name!r}; did you mean {nearest}? Expected some of {', '.join(known)}"
        )
    return name


_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_STRICT)
class MeshConfig:
    """Number of devices on each mesh axis.

    Attributes:
        data: Devices that share the batch; -1 takes all that the others leave.
        expert: Devices that share the experts of a layer.
        replica: Copies of all weights; none takes one for each TPU slice or GPU host.
        transport: How tokens reach the devices of their experts: all to all of them, or each to its
            own.
        cpu_devices: Without an accelerator, devices that JAX splits the CPU into; about one per
            core is fastest; none leaves it to JAX. Ignored on TPU and GPU.
    """

    data: Annotated[int, Field(strict=True, ge=-1, lt=2**31)] = -1
    expert: Count = 1
    replica: Count | None = None
    transport: Literal["all_gather", "ragged_all_to_all"] = "all_gather"
    cpu_devices: Annotated[int, Field(strict=True, ge=1, le=1024)] | None = None


@dataclass(frozen=True, config=_STRICT)
class LoRAConfig:
    """Low-rank updates of frozen matrices, for `method: lora`. The defaults are the paper's.

    Attributes:
        rank: Columns of A and rows of B.
        alpha: The update of a matrix is `alpha / rank * A B`.
        targets: What is updated: `attention`, `dense_mlps`, `shared_experts`, and of the routed
            experts all (`experts`) or the selected ones (`selected_experts`). What the model does
            not have is left out.
    """

    rank: Count = 8
    alpha: Positive = 16.0
    targets: Annotated[
        tuple[Annotated[Target, BeforeValidator(_known_target)], ...], Field(min_length=1)
    ] = ("attention", "dense_mlps", "shared_experts", "experts")


@dataclass(frozen=True, config=_STRICT)
class QuantiseConfig:
    """How frozen weights are kept in memory. What is trained never begins with a rounded weight.

    Attributes:
        experts: Scheme of routed experts: `int8`, `int4`; `mxfp4`, which keeps what is published so
            as it is; `fp8`, of models that are published in blocks of it, as they are; `none` keeps
            them in the run's `dtype`.
        rest: The same of attention, dense MLPs and shared experts, unless they are trained.
        group_size: Inputs of a matrix that share a scale; of MXFP4 always 32, of fp8 as published.
    """

    experts: Literal["none", "int8", "int4", "mxfp4", "fp8"] = "none"
    rest: Literal["none", "int8", "fp8"] = "none"
    group_size: Annotated[int, Field(strict=True, ge=16, le=1024)] = 64

    @property
    def chosen(self) -> Quantisation | None:
        """What is quantised, if anything."""
        experts = None if self.experts == "none" else self.experts
        rest = None if self.rest == "none" else self.rest
        return Quantisation(experts, rest, self.group_size) if experts or rest else None


@dataclass(frozen=True, config=_STRICT)
class OtherConfig:
    """A task or domain that the run is not trained on.

    Attributes:
        data: File of prompts with accepted answers, as in `EvaluationConfig`.
        metric: Name of a metric of `esft_jax.evaluation.metrics`.
        max_new_tokens: Tokens per completion, at most; none takes that of the run's own task.
        valid: Held-out files for the loss, in packed rows of `data.sequence_length`.
        format: Of `valid`, as `data.format`.
        columns: Of `valid`, as `data.columns`.
    """

    data: LocalPath | None = None
    metric: MetricName = "exact_match"
    max_new_tokens: Count | None = None
    valid: tuple[LocalPath, ...] = ()
    format: FormatName | None = None
    columns: dict[str, Text] = field(default_factory=dict)


@dataclass(frozen=True, config=_STRICT)
class EvaluationConfig:
    """Completions of task prompts, and how they are judged.

    Attributes:
        data: File of prompts with accepted answers, or of chats whose last message is the answer.
        metric: Name of a metric of `esft_jax.evaluation.metrics`.
        max_new_tokens: Tokens per completion, at most.
        batch_size: Prompts decoded together, and held-out rows per forward pass, over all devices.
        temperature: 0 decodes greedily.
        top_p: Nucleus of the sampled distribution.
        limit: Examples to evaluate, from the first; none takes all.
        others: What the run is not trained on, by name, to see what it forgets. Without these and
            without `data` there is no evaluation.
    """

    data: LocalPath | None = None
    metric: MetricName = "exact_match"
    max_new_tokens: Count = 128
    batch_size: Count = 16
    temperature: NonNegative = 0.0
    top_p: Share = 1.0
    limit: Count | None = None
    others: Annotated[dict[Name, OtherConfig], AfterValidator(distinct_names)] = field(
        default_factory=dict
    )

    @property
    def asked(self) -> bool:
        """Whether there is anything to evaluate."""
        return self.data is not None or bool(self.others)


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """Everything a run depends on besides the files it names.

    Building one by hand raises `pydantic.ValidationError` (a `ValueError`) for a bad value;
    `load_config` raises `InputError`.

    Attributes:
        model: Hugging Face folder, folder written by `convert`, or hub name of the base model.
        output: Folder of the run.
        data: Training and validation examples.
        method: `esft` trains selected experts, `full` every parameter, `lora` low-rank updates.
        init: Start from the weights in `model`, or from random ones (`method: full` only).
        expert_cfg: File of the experts to train; none scores and selects first.
        dtype: Data type of computation and frozen weights; of masters, see `optimizer`.
        seed: Seed of initialisation, shuffling and sampling.
        mesh: Devices per mesh axis.
        score: How expert relevance is measured.
        select: Which experts are trained.
        lora: Low-rank updates; only with `method: lora`.
        quantise: How frozen weights are kept in memory; not with `method: full`.
        frozen_memory: Where the matrices of frozen routed experts are kept: in the memory of the
            `device`, or in that of its `host`, from where each layer's are moved to the device when
            the layer is computed; not with `method: full`.
        train: The training loop.
        optimizer: The optimizer and its schedule.
        evaluation: Completions of task prompts, and how they are judged.
    """

    model: LocalPath
    output: LocalPath
    data: DataConfig
    method: Method = "esft"
    init: Literal["pretrained", "random"] = "pretrained"
    expert_cfg: LocalPath | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: Seed = 0
    mesh: MeshConfig = MeshConfig()
    score: ScoreConfig = ScoreConfig()
    select: SelectConfig = SelectConfig()
    lora: LoRAConfig = LoRAConfig()
    quantise: QuantiseConfig = QuantiseConfig()
    frozen_memory: Literal["device", "host"] = "device"
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    def __post_init__(self) -> None:
        """Check what concerns several keys at once; each message starts with the key to change."""
        train, optimizer = self.train, self.optimizer
        problem = self._lora_problem()
        if problem:
            pass
        elif self.method == "esft" and self.init == "random":
            problem = "init: random weights have no experts to select; expected pretrained"
        elif mistake := self.data.problem() or self._others_problem():
            problem = mistake
        elif mistake := self.select.problem():
            problem = f"select.{mistake}"
        elif mistake := self._score_problem():
            problem = f"score.{mistake}"
        elif self.expert_cfg is not None and self.select.scores:
            problem = "select.scores: expert_cfg says already what is trained; expected one of them"
        elif self.method == "full" and self.expert_cfg is not None:
            problem = "expert_cfg: method full trains every expert; expected no expert_cfg"
        elif self.expert_cfg is not None and self.select.also:
            problem = "select.also: expert_cfg says already what is trained; expected one of them"
        elif self.method == "full" and self.select.also:
            problem = "select.also: method full trains every parameter; expected none"
        elif self.method == "esft" and train.balance_loss > 0:
            problem = (
                "train.balance_loss: the router is frozen with method esft, or trained without it; "
                "expected 0"
            )
        elif self.method == "full" and self.quantise.chosen:
            problem = "quantise: method full freezes nothing; expected neither experts nor rest"
        elif self.quantise.chosen is None and self.quantise != QuantiseConfig():
            problem = "quantise.group_size: nothing is quantised; expected experts or rest"
        elif self.method == "full" and self.frozen_memory == "host":
            problem = "frozen_memory: method full freezes nothing; expected device"
        elif self.method == "full" and train.verify_frozen:
            problem = "train.verify_frozen: method full freezes nothing; expected false"
        elif empty := [n for n, o in self.evaluation.others.items() if not (o.data or o.valid)]:
            problem = f"evaluation.others.{empty[0]}: nothing to evaluate; expected data or valid"
        elif self.mesh.data == 0:
            problem = "mesh.data: no devices; expected -1 (all the rest) or at least 1"
        elif mistake := train.problem():
            problem = f"train.{mistake}"
        elif train.early_stopping.patience is not None and not self.data.valid:
            problem = "train.early_stopping.patience: needs data.valid, whose loss stops the run"
        elif mistake := optimizer.problem():
            problem = f"optimizer.{mistake}"
        elif train.epochs is None:  # else the steps are not known yet
            mistake = optimizer.schedule_problem(train.steps)
            problem = mistake and f"optimizer.{mistake}"
        if problem:
            raise ValueError(problem)

    @property
    def selects_experts(self) -> bool:
        """Whether the run needs to know which experts serve its task."""
        if self.method == "lora":
            return "selected_experts" in self.lora.targets
        return self.method == "esft"

    @property
    def measures_scores(self) -> bool:
        """Whether the run scores experts to select from, unless it has done so before."""
        return self.selects_experts and self.expert_cfg is None and not self.select.scores

    @property
    def further_scores(self) -> tuple[FurtherMethod, ...]:
        """What scoring measures besides the scores of the routing."""
        asked = {*self.score.methods, self.select.method}
        return tuple(method for method in FURTHER_METHODS if method in asked)

    @property
    def row_lengths(self) -> dict[str, int]:
        """Tokens per packed row, by the section that says it; `score` only if it is read."""
        lengths = {"data": self.data.sequence_length}
        return lengths | ({"score": self.score.sequence_length} if self.measures_scores else {})

    def _score_problem(self) -> str | None:
        score = self.score
        if len(set(score.methods)) < len(score.methods):
            return f"methods: one is named twice in {', '.join(score.methods)}"
        contrasts = "contrast" in self.further_scores
        if score.general and not contrasts:
            return "general: only contrast reads it; expected contrast in score.methods"
        if contrasts and not score.general and (self.measures_scores or score.methods):
            return "general: contrast compares with it; expected files of a sample"
        if score.general_format is not None and not score.general:
            return "general_format: score.general names no files; expected some"
        return None

    def _others_problem(self) -> str | None:
        for name, other in self.evaluation.others.items():
            if mistake := check_columns(other.format, other.columns):
                return f"evaluation.others.{name}.columns: {mistake}"
        return None

    def _lora_problem(self) -> str | None:
        targets = self.lora.targets
        if self.method != "lora":
            return (
                None
                if self.lora == LoRAConfig()
                else f"lora: method {self.method} reads none of it; expected method: lora"
            )
        if len(set(targets)) < len(targets):
            return f"lora.targets: a target is named twice in {', '.join(targets)}"
        if {"experts", "selected_experts"} <= set(targets):
            return "lora.targets: experts includes selected_experts; expected one of them"
        if self.expert_cfg is not None and "selected_experts" not in targets:
            return "expert_cfg: lora.targets has no selected_experts; expected no expert_cfg"
        if self.select.also:
            return "select.also: lora.targets says what is trained besides; expected none"
        if self.init == "random":
            return "init: low-rank updates need weights to update; expected pretrained"
        if self.train.balance_loss > 0:
            return "train.balance_loss: the router is frozen with method lora; expected 0"
        return None


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML 1.2 file, apply `a.b=value` overrides (values in YAML), and check the result.

    Raises:
        InputError: A file, key or value is wrong; names the file and line, or the override.
    """
    config = strict_yaml.load(RunConfig, path, overrides)
    if config.expert_cfg is not None:
        try:
            check_file(config.expert_cfg)
        except InputError as error:
            raise InputError(
                f"{path}: expert_cfg: {error}; expected a file written by `select`"
            ) from None
    return config


def save_config(config: RunConfig, path: str | Path) -> None:
    """Write every key, defaults included, as YAML that `load_config` reads back as equal."""
    strict_yaml.save(config, path)


def changes(before: RunConfig, after: RunConfig) -> Iterator[tuple[str, Any, Any]]:
    """The keys in which two configurations differ, such as `train.steps`, with both values.

    A key that one of them does not have, of a source in `data.mix` for one, is None there.
    """
    old, new = by_key(asdict(before)), by_key(asdict(after))
    for key in new | old:
        if old.get(key) != new.get(key):
            yield key, old.get(key), new.get(key)


def by_key(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested sections, by keys with dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= by_key(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
