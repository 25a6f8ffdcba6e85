"""The evaluation of a run: its own task, and what it is not trained on, before and after."""

import dataclasses
import hashlib
import json
import math
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import NonNegativeInt

from esft_jax.adapt.parts import roles_of
from esft_jax.checkpoint.adapter import load_adapter
from esft_jax.checkpoint.identity import tokenizer_fingerprint
from esft_jax.checkpoint.load import local_folder, open_source
from esft_jax.checkpoint.manifest import MANIFEST, read_manifest, run_chat_format
from esft_jax.checkpoint.peft import ADAPTER_CONFIG
from esft_jax.checkpoint.resident import choose_adapter
from esft_jax.checkpoint.tensor_files import TensorFiles
from esft_jax.config import EvaluationConfig, OtherConfig, QuantiseConfig, RunConfig
from esft_jax.data.chat_template import ChatFormat
from esft_jax.data.pipeline import PackedDataset
from esft_jax.data.records import expand, source_sha256
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.data_config import DataConfig
from esft_jax.errors import InputError, RunFailed, shown
from esft_jax.evaluation.judge import Judge
from esft_jax.evaluation.load import is_resident, load_resident, load_tuned
from esft_jax.evaluation.metrics import METRICS, write_completions
from esft_jax.evaluation.tasks import (
    HeldoutLoss,
    TaskRow,
    check_task,
    evaluate_task,
    heldout_loss,
    read_task,
)
from esft_jax.families import load_model_config, tensor_table
from esft_jax.files import check_writable, checked, read_json, write_text_atomic
from esft_jax.memory import check_fits
from esft_jax.model.transformer import Transformer
from esft_jax.processes import any_process
from esft_jax.progress import Progress
from esft_jax.sharding import make_mesh
from esft_jax.training.rows import held_out_rows
from esft_jax.training.run_folder import RunFolder

# The run's own task, among the names of `evaluation.others`.
OWN = "task"

# Parts of a chat format, and the configuration's keys for them.
_CHAT_KEYS = {
    "template": "data.chat_template",
    "arguments": "data.template_arguments",
    "stop_token": "data.stop_token",
}

_SCORES, _COMPLETIONS = "scores.json", "completions.jsonl"


@dataclass(frozen=True)
class Score:
    """What one task or domain gave.

    Attributes:
        metric: label of the metric (`Metric.label`); None if nothing was completed.
        value: the metric, in percent.
        rows: completions.
        failures: those that a judge gave no readable score; they are not in `value`.
        heldout: loss on held-out data; None without such data.
    """

    metric: str | None
    value: float | None
    rows: NonNegativeInt
    failures: NonNegativeInt
    heldout: HeldoutLoss | None


@dataclass(frozen=True)
class EvaluationReport:
    """What `run_evaluation` found and wrote.

    Attributes:
        scores: by name; the run's own task, if it has one, is `OWN` and comes first.
        kept: names of those that an earlier evaluation found.
        seconds: spent, loading included.
        base_fingerprint: of the model without its adapter.
        folders: by name, where `scores.json` and `completions.jsonl` lie. They are in one folder,
            that of the evaluated weights.
    """

    scores: dict[str, Score]
    kept: tuple[str, ...]
    seconds: float
    base_fingerprint: str
    folders: dict[str, Path]

    @property
    def folder(self) -> Path:
        """What was found of these weights, with these settings or others."""
        return next(iter(self.folders.values())).parent


@dataclass(frozen=True)
class TaskInputs:
    """What is read of one task or domain: prompts to complete, held-out data, or both.

    Attributes:
        facts: what its scores depend on besides the model.
    """

    rows: list[TaskRow]
    metric: str
    max_new_tokens: int
    heldout: PackedDataset | None
    facts: dict[str, Any]


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation reads, except weights; see `check_evaluation`."""

    tokenizer: Tokenizer
    mesh: Mesh
    tasks: dict[str, TaskInputs]
    judge: Judge | None

    def describe(self) -> dict[str, str]:
        """What the held-out data holds, and how much of it is lost, by name."""
        return {
            name: task.heldout.describe()
            for name, task in self.tasks.items()
            if task.heldout is not None
        }


@dataclass(frozen=True)
class _Target:
    """The weights to evaluate, and where their scores lie.

    Attributes:
        facts: what scores depend on besides data and settings; not where it lies.
        folders: by name of the task or domain; see `run_evaluation`.
    """

    facts: dict[str, Any]
    folders: dict[str, Path]


def check_evaluation(config: RunConfig) -> EvaluationInputs:
    """Read everything but weights, and check that it fits together.

    Raises:
        InputError: naming the key, file, line or environment variable that is wrong.
    """
    evaluation = config.evaluation
    if not evaluation.asked:
        raise InputError("evaluation.data: not set; expected a file of prompts and answers")
    run = RunFolder(config.output)
    check_writable(run.path, "output")
    run.check_way()
    folder = local_folder(config.model)
    shape = load_model_config(folder)
    data = config.data
    chats = ChatFormat.read(data.chat_template, data.template_arguments, data.stop_token)
    tokenizer = Tokenizer.load(folder, chats)
    tokenizer.check_vocabulary(shape.vocab_size)
    mesh = make_mesh(config.mesh.data, config.mesh.expert, replica=config.mesh.replica)
    named: list[EvaluationConfig | OtherConfig] = [evaluation, *evaluation.others.values()]
    judged = any(METRICS[task.metric].rubric for task in named if task.data is not None)
    judge = Judge.from_environment(run.evaluation / "judge") if judged else None
    limit = shape.max_positions
    tasks = dict(_tasks(evaluation, data, config.seed, limit, tokenizer, judge))
    return EvaluationInputs(tokenizer, mesh, tasks, judge)


def _tasks(
    evaluation: EvaluationConfig,
    data: DataConfig,
    seed: int,
    limit: int,
    tokenizer: Tokenizer,
    judge: Judge | None,
) -> Iterator[tuple[str, TaskInputs]]:
    """What is read of each task and domain, with its name.

    Args:
        limit: tokens that the model takes at once.
    """

    def read(
        prompts: str | None,
        metric: str,
        max_new_tokens: int,
        heldout: PackedDataset | None,
        share: float | None = None,
    ) -> TaskInputs:
        paths = [] if prompts is None else expand([prompts])
        rows = [] if prompts is None else read_task(prompts)[: evaluation.limit]
        check_task(rows, tokenizer, metric, max_new_tokens, limit)
        facts: dict[str, Any] = {
            "rows": len(rows),
            "seed": seed,
            "sequence_length": data.sequence_length if heldout else None,
            "format": str(heldout.data.format) if heldout else None,
            "too_long": data.too_long if heldout else None,
            "data_sha256": {path: source_sha256(path) for path in paths}
            | (heldout.stats.sha256 if heldout else {}),
        }
        if share is not None:
            facts["valid_share"] = share
        if rows:
            facts |= {
                "metric": METRICS[metric].label([row.answers for row in rows]),
                "judge": judge.model if judge and METRICS[metric].rubric else None,
                "max_new_tokens": max_new_tokens,
                "temperature": evaluation.temperature,
                "top_p": evaluation.top_p,
            }
        return TaskInputs(rows, metric, max_new_tokens, heldout, facts)

    everything = [data.valid, *(other.valid for other in evaluation.others.values())]
    if any(everything) and data.sequence_length > limit:
        raise InputError(
            f"data.sequence_length: {data.sequence_length} tokens; the model's limit is "
            f"{limit} (max_position_embeddings)"
        )
    if evaluation.data is not None or data.valid:
        yield (
            OWN,
            read(
                evaluation.data,
                evaluation.metric,
                evaluation.max_new_tokens,
                held_out_rows(data, data, tokenizer, seed),
                data.valid if isinstance(data.valid, float) else None,
            ),
        )
    for name, other in evaluation.others.items():
        count = other.max_new_tokens or evaluation.max_new_tokens
        section = f"evaluation.others.{name}"
        heldout = held_out_rows(other, data, tokenizer, seed, section)
        yield name, read(other.data, other.metric, count, heldout)


def run_evaluation(
    config: RunConfig,
    adapter: str | Path | None = None,
    inputs: EvaluationInputs | None = None,
) -> EvaluationReport:
    """Evaluate a configuration's model, alone or with an adapter, on all that it names.

    Writes `scores.json` and `completions.jsonl` (the reference's format) of each task or domain to
    `{output}/evaluation/{WEIGHTS}/{NAME}`. Both folders have the hash of what the scores depend on
    in their names, so that no evaluation replaces another one: WEIGHTS is `base-HASH`,
    `adapter-HASH`, or `model-HASH` for the run's own result of full training; NAME is `task-HASH`
    or that of one of `evaluation.others`. A score that exists already is used again.

    Args:
        inputs: what `check_evaluation` returned; default: calls it.

    Raises:
        InputError: model, adapter or data do not fit the configuration, or kept scores are damaged;
            before any compute.
        RunFailed: a held-out loss is not finite.
    """
    return run_evaluations(config, [adapter], inputs or check_evaluation(config))[0]


def run_evaluations(
    config: RunConfig, adapters: Sequence[str | Path | None], inputs: EvaluationInputs
) -> list[EvaluationReport]:
    """As `run_evaluation`, of several adapters of one base, which is loaded once for all of those
    that can be resident together (`attach_adapters`); others have it to themselves.

    Args:
        adapters: folders; None stands for the base alone.
    """
    pending = [_Pending.open(config, adapter, inputs) for adapter in adapters]
    missing = [each for each in pending if each.missing]
    several = len(missing) > 1
    together = [each for each in missing if several and is_resident(each.adapter)]
    alone = [[each] for each in missing if each not in together]
    for group in filter(None, [together, *alone]):
        _evaluate_missing(config, group, inputs)
    return [each.report() for each in pending]


@dataclass
class _Pending:
    """The evaluation of some weights: what is known of it, and what is missing.

    Attributes:
        target: None where nothing of such weights was evaluated before.
        scores: by name; None where it is missing.
        kept: names of those that an earlier evaluation found.
        seconds: spent.
    """

    adapter: str | Path | None
    target: _Target | None
    scores: dict[str, Score | None]
    kept: tuple[str, ...]
    seconds: float

    @classmethod
    def open(
        cls, config: RunConfig, adapter: str | Path | None, inputs: EvaluationInputs
    ) -> "_Pending":
        """What earlier evaluations have left."""
        begin = time.perf_counter()
        target, scores = None, dict[str, Score | None](dict.fromkeys(inputs.tasks))
        run = RunFolder(config.output)
        earlier = run.evaluation.glob(f"{_kind(run, config.model, adapter)}-*")
        if any_process(any(earlier)):
            target = _target(config, adapter, inputs, open_source(config.model).fingerprint)
            scores = _kept_scores(target, inputs)
        # Where processes see different files, all of them compute.
        scores = {name: None if any_process(not score) else score for name, score in scores.items()}
        kept = tuple(name for name, score in scores.items() if score is not None)
        if len(kept) < len(scores):
            _check_chat_format(adapter, inputs.tokenizer.chat_format)
        return cls(adapter, target, scores, kept, time.perf_counter() - begin)

    @property
    def missing(self) -> list[str]:
        """Names of what is still to be evaluated."""
        return [name for name, score in self.scores.items() if score is None]

    def report(self) -> EvaluationReport:
        """What was found, once nothing is missing."""
        done = {name: score for name, score in self.scores.items() if score is not None}
        assert self.target is not None, "there is a task or domain, and its score is kept or new"
        return _report(self.target, done, self.kept, self.seconds)


def _evaluate_missing(
    config: RunConfig, group: Sequence[_Pending], inputs: EvaluationInputs
) -> None:
    """Evaluate what is missing of one adapter, or of several that are loaded together."""
    begin = time.perf_counter()
    options = (
        jnp.dtype(config.dtype),
        inputs.mesh,
        config.quantise.chosen,
        roles_of(config.select.also),
        config.frozen_memory,
    )
    if len(group) == 1:
        base = load_tuned(config.model, group[0].adapter, *options)
    else:
        base = load_resident(config.model, [str(each.adapter) for each in group], *options)
    for number, each in enumerate(group):
        if len(group) > 1:
            choose_adapter(base.model, number)
        target = each.target or _target(config, each.adapter, inputs, base.fingerprint)
        adapter = None if each.adapter is None else str(each.adapter)
        names = {"model": config.model, "adapter": adapter}
        for name in each.missing:
            facts, folder = names | target.facts, target.folders[name]
            each.scores[name] = _evaluate(
                config.evaluation, base.model, inputs, name, folder, facts, config.seed
            )
        each.target = target
        each.seconds, begin = each.seconds + time.perf_counter() - begin, time.perf_counter()


def evaluate_result(config: RunConfig, result: Path, inputs: EvaluationInputs) -> EvaluationReport:
    """Evaluate what a run has left behind: its model (`method: full`), or its adapter."""
    if config.method == "full":
        trained = dataclasses.replace(config, model=str(result))
        return run_evaluation(trained, None, inputs)
    return run_evaluation(config, result, inputs)


def evaluate_in_full_precision(
    config: RunConfig, adapter: str | Path, inputs: EvaluationInputs, say: Callable[[str], None]
) -> EvaluationReport | None:
    """Evaluate an adapter on the base as it was before it was quantised, which is what an export
    gives; None if the run did not quantise it, or if it is too large for the devices.

    Args:
        say: receives a line that says so.

    Raises:
        InputError: see `run_evaluation`.
    """
    if config.quantise.chosen is None:
        return None
    shape, dtype = load_model_config(local_folder(config.model)), jnp.dtype(config.dtype)
    numbers = sum(math.prod(p.shape) for p in tensor_table(shape).places.values())
    needed = numbers * dtype.itemsize // inputs.mesh.size
    try:
        check_fits(needed, "not evaluated in full precision, which takes")
    except InputError as error:
        say(str(error))
        return None
    return run_evaluation(dataclasses.replace(config, quantise=QuantiseConfig()), adapter, inputs)


def kept_evaluation(
    config: RunConfig, inputs: EvaluationInputs, fingerprint: str
) -> EvaluationReport | None:
    """What an earlier evaluation of the base alone found; None unless it is all there and was done
    with these settings.

    Args:
        fingerprint: of the base.
    """
    target = _target(config, None, inputs, fingerprint)
    scores = _kept_scores(target, inputs)
    found = {name: score for name, score in scores.items() if score is not None}
    return _report(target, found, tuple(found)) if len(found) == len(scores) else None


def _kept_scores(target: _Target, inputs: EvaluationInputs) -> dict[str, Score | None]:
    """Scores of the same weights on the same data with the same settings, where there are any."""
    return {
        name: _kept(target.folders[name] / _SCORES, task, target.facts | task.facts)
        for name, task in inputs.tasks.items()
    }


def _report(
    target: _Target, scores: dict[str, Score], kept: tuple[str, ...], seconds: float = 0.0
) -> EvaluationReport:
    fingerprint = target.facts["base_fingerprint"]
    return EvaluationReport(scores, kept, seconds, fingerprint, target.folders)


def _check_chat_format(adapter: str | Path | None, chat_format: ChatFormat) -> None:
    """Refuse to evaluate an adapter on chats that its run would have rendered otherwise."""
    if adapter is None or not read_manifest(Path(adapter)):
        return
    trained, asked = run_chat_format(adapter).to_json(), chat_format.to_json()
    for key, name in _CHAT_KEYS.items():
        if trained.get(key) != asked.get(key):
            raise InputError(
                f"{name}: is {shown(asked.get(key))}; {Path(adapter) / MANIFEST}: chat.{key}: is "
                f"{shown(trained.get(key))}; expected what the adapter was trained with"
            )


def _evaluate(
    evaluation: EvaluationConfig,
    model: Transformer,
    inputs: EvaluationInputs,
    name: str,
    folder: Path,
    facts: Mapping[str, Any],
    seed: int,
) -> Score:
    """Evaluate one task or domain and write down what came out."""
    begin, task = time.perf_counter(), inputs.tasks[name]
    result = None
    if task.rows:
        with Progress(f"evaluate {name}", len(task.rows)) as bar:
            result = evaluate_task(
                model,
                inputs.tokenizer,
                task.rows,
                task.metric,
                judge=inputs.judge,
                max_new_tokens=task.max_new_tokens,
                temperature=evaluation.temperature,
                top_p=evaluation.top_p,
                seed=seed,
                batch_size=evaluation.batch_size,
                advance=bar.advance,
            )
    heldout = None
    if task.heldout is not None:
        what = f"held out {name}"
        heldout = heldout_loss(model, task.heldout, evaluation.batch_size, what)
    score = Score(
        None if result is None else result.metric,
        None if result is None else result.value,
        len(task.rows),
        0 if result is None else result.failures,
        heldout,
    )
    if heldout is not None and not math.isfinite(heldout.nats_per_token):
        raise RunFailed(
            f"evaluation of {name}: the held-out loss is {heldout.nats_per_token}; expected a "
            "finite number, as of weights that are finite"
        )
    if jax.process_index() == 0:
        target = folder / _SCORES
        target.unlink(missing_ok=True)  # it comes last
        if result is not None:
            write_completions(folder / _COMPLETIONS, result.completions)
        content = dataclasses.asdict(score) | {"seconds": time.perf_counter() - begin}
        content |= {**facts, **task.facts}
        write_text_atomic(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return score


def _kept(path: Path, task: TaskInputs, facts: Mapping[str, Any]) -> Score | None:
    """The score in a file, if there is one, and the completions that it is of are there too.

    Raises:
        InputError: the file is not as it was written.
    """
    if not path.exists() or (task.rows and not path.with_name(_COMPLETIONS).exists()):
        return None
    content = read_json(path)
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object, as it was written")
    for key, expected in facts.items():
        if content.get(key) != expected:
            raise InputError(
                f"{path}: {key}: is {reprlib.repr(content.get(key))}, where the folder's name "
                f"stands for {reprlib.repr(expected)}; expected the file as it was written, or none"
            )
    fields = {field.name for field in dataclasses.fields(Score)}
    kept = {key: value for key, value in content.items() if key in fields}
    score = checked(Score, kept, str(path))
    for key, needed in (("value", bool(task.rows)), ("heldout", task.heldout is not None)):
        if (getattr(score, key) is not None) != needed:
            found = reprlib.repr(content[key])
            raise InputError(f"{path}: {key}: is {found}; expected {'one' if needed else 'none'}")
    return score


def _target(
    config: RunConfig, adapter: str | Path | None, inputs: EvaluationInputs, fingerprint: str
) -> _Target:
    run, model = RunFolder(config.output), local_folder(config.model)
    facts: dict[str, Any] = {
        "base_fingerprint": fingerprint,
        "config_fingerprint": load_model_config(model).fingerprint,
        "tokenizer_fingerprint": tokenizer_fingerprint(model, inputs.tokenizer),
        "adapter_sha256": None if adapter is None else adapter_sha256(Path(adapter)),
        "dtype": config.dtype,
    }
    if config.quantise.chosen:
        facts["quantise"] = dataclasses.asdict(config.quantise)
    weights = f"{_kind(run, config.model, adapter)}-{short_hash(facts)}"
    folder = run.evaluation / weights
    folders = {
        name: folder / f"{name}-{short_hash(task.facts)}" for name, task in inputs.tasks.items()
    }
    return _Target(facts, folders)


def adapter_sha256(folder: Path) -> str:
    """Hash of its tensors, and of what scales them if they are factors."""
    load_adapter(folder)  # says best what is wrong with it
    return _sha256([*TensorFiles(folder).files, folder / ADAPTER_CONFIG])


def _sha256(paths: Iterable[Path]) -> str:
    """Hash of names and contents of the files that exist."""
    digest = hashlib.sha256()
    for path in paths:
        if path.exists():
            digest.update(f"{path.name}:{source_sha256(str(path))}\n".encode())
    return digest.hexdigest()


def _kind(run: RunFolder, model: str, adapter: str | Path | None) -> str:
    """What is evaluated: the adapter, the run's own full model, or the base."""
    if adapter is not None:
        return run.adapter.name
    return run.model.name if Path(model) == run.model else "base"


def short_hash(facts: object) -> str:
    """Hash of JSON values, for the names of files that depend on them."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
