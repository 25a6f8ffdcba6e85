"""The evaluation of a run: its own task, and what it is not trained on, before and after."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from tqdm import tqdm

from esft_jax.config import EvaluationConfig, OtherConfig, RunConfig
from esft_jax.data.pipeline import PackedDataset, build_dataset
from esft_jax.data.read import source_sha256
from esft_jax.data.tokenizer import TOKENIZER_FILES, Tokenizer
from esft_jax.errors import InputError
from esft_jax.evaluation.judge import Judge
from esft_jax.evaluation.metrics import METRICS, write_completions
from esft_jax.evaluation.tasks import (
    HeldoutLoss,
    TaskRow,
    check_task,
    evaluate_task,
    heldout_loss,
    read_task,
)
from esft_jax.files import check_writable, parse_json, read_text, write_text_atomic
from esft_jax.hf.adapter import apply_adapter, load_adapter
from esft_jax.hf.load import LoadedBase, load_base, local_folder, open_source
from esft_jax.hf.lora import ADAPTER_CONFIG
from esft_jax.mesh import any_process, make_mesh
from esft_jax.model.config import ModelConfig
from esft_jax.model.transformer import Transformer
from esft_jax.training.run_folder import RunFolder

# The run's own task, among the names of `evaluation.others`.
OWN = "task"


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
    rows: int
    failures: int
    heldout: HeldoutLoss | None


@dataclass(frozen=True)
class EvaluationReport:
    """What `run_evaluation` found and wrote.

    Attributes:
        scores: by name; the run's own task, if it has one, is `OWN` and comes first.
        seconds: spent, loading included.
        base_fingerprint: of the model without its adapter.
        folder: holds `scores.json` and `completions.jsonl`, and a folder of these for each of the
            others.
    """

    scores: dict[str, Score]
    seconds: float
    base_fingerprint: str
    folder: Path


@dataclass(frozen=True)
class Case:
    """One task or domain to evaluate: prompts to complete, held-out data, or both.

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
    cases: dict[str, Case]
    judge: Judge | None


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
    folder = local_folder(config.model)
    shape, tokenizer = ModelConfig.load(folder), Tokenizer.load(folder)
    tokenizer.check_vocabulary(shape.vocab_size)
    mesh = make_mesh(config.mesh.data, config.mesh.expert, replica=config.mesh.replica)
    named: list[EvaluationConfig | OtherConfig] = [evaluation, *evaluation.others.values()]
    judged = any(METRICS[case.metric].rubric for case in named if case.data is not None)
    judge = Judge.from_environment(run.evaluation / "judge") if judged else None
    cases = dict(_cases(config, folder, shape, tokenizer, judge))
    return EvaluationInputs(tokenizer, mesh, cases, judge)


def _cases(
    config: RunConfig, folder: Path, shape: ModelConfig, tokenizer: Tokenizer, judge: Judge | None
) -> Iterator[tuple[str, Case]]:
    evaluation, data = config.evaluation, config.data
    tokenizer_sha256 = _sha256(folder / name for name in TOKENIZER_FILES)

    def case(
        task: str | None,
        metric: str,
        max_new_tokens: int,
        valid: tuple[str, ...],
        format: Literal["chat", "text"],
    ) -> Case:
        rows = [] if task is None else read_task(task)[: evaluation.limit]
        check_task(rows, tokenizer, metric, max_new_tokens, shape.max_positions)
        heldout = None
        if valid:
            heldout = build_dataset(
                valid,
                tokenizer,
                format=format,
                sequence_length=data.sequence_length,
                too_long=data.too_long,
                seed=config.seed,
            )
        facts: dict[str, Any] = {
            "tokenizer_sha256": tokenizer_sha256,
            "rows": len(rows),
            "seed": config.seed,
            "sequence_length": data.sequence_length if valid else None,
            "format": format if valid else None,
            "data_sha256": ({} if task is None else {task: source_sha256(task)})
            | ({} if heldout is None else heldout.stats.sha256),
        }
        if rows:
            facts |= {
                "metric": METRICS[metric].label([row.answers for row in rows]),
                "judge": judge.model if judge and METRICS[metric].rubric else None,
                "max_new_tokens": max_new_tokens,
                "temperature": evaluation.temperature,
                "top_p": evaluation.top_p,
            }
        return Case(rows, metric, max_new_tokens, heldout, facts)

    everything = [data.valid, *(other.valid for other in evaluation.others.values())]
    if any(everything) and data.sequence_length > shape.max_positions:
        raise InputError(
            f"data.sequence_length: {data.sequence_length} tokens; the model's limit is "
            f"{shape.max_positions} (max_position_embeddings)"
        )
    if evaluation.data is not None or data.valid:
        yield (
            OWN,
            case(
                evaluation.data,
                evaluation.metric,
                evaluation.max_new_tokens,
                data.valid,
                data.format,
            ),
        )
    for name, other in evaluation.others.items():
        count = other.max_new_tokens or evaluation.max_new_tokens
        yield name, case(other.data, other.metric, count, other.valid, other.format)


def run_evaluation(
    config: RunConfig,
    adapter: str | Path | None = None,
    inputs: EvaluationInputs | None = None,
    *,
    reuse: bool = False,
) -> EvaluationReport:
    """Evaluate a configuration's model, alone or with an adapter, on all that it names.

    Writes `completions.jsonl` (the reference's format) and `scores.json` to
    `{output}/evaluation/{base,adapter,model}`, and those of `evaluation.others` to folders of their
    names in it; `model` is the run's own result of full training.

    Args:
        inputs: what `check_evaluation` returned; default: calls it.
        reuse: take over scores of the same weights on the same data with the same settings.

    Raises:
        InputError: model, adapter or data do not fit the configuration; before any compute.
    """
    begin = time.perf_counter()
    inputs = inputs or check_evaluation(config)
    target = _result_folder(config, adapter)
    scores: dict[str, Score | None] = dict.fromkeys(inputs.cases)
    fingerprint = None
    if reuse and any(_scores_file(target, name).exists() for name in scores):
        fingerprint = open_source(config.model).fingerprint
        scores = _kept_scores(target, inputs, _model_facts(config, adapter, fingerprint))
    # Where processes see different files, all of them compute.
    scores = {name: None if any_process(not score) else score for name, score in scores.items()}
    if None in scores.values():
        base = load_tuned(config.model, adapter, jnp.dtype(config.dtype), inputs.mesh)
        if jax.process_index() == 0:  # it speaks of scores that give way
            RunFolder(config.output).comparison.unlink(missing_ok=True)
        fingerprint = fingerprint or base.fingerprint
        facts = _model_facts(config, adapter, fingerprint)
        for name in [name for name, score in scores.items() if score is None]:
            folder = _scores_file(target, name).parent
            scores[name] = _evaluate(config, base.model, inputs, name, folder, facts)
    done = {name: score for name, score in scores.items() if score is not None}
    assert fingerprint is not None, "there is a case, and its score is kept or new"
    return EvaluationReport(done, time.perf_counter() - begin, fingerprint, target)


def evaluate_result(config: RunConfig, result: Path, inputs: EvaluationInputs) -> EvaluationReport:
    """Evaluate what a run has left behind: its model (`method: full`), or its adapter."""
    if config.method == "full":
        trained = dataclasses.replace(config, model=str(result))
        return run_evaluation(trained, None, inputs, reuse=True)
    return run_evaluation(config, result, inputs, reuse=True)


def kept_evaluation(
    config: RunConfig, inputs: EvaluationInputs, fingerprint: str
) -> EvaluationReport | None:
    """What an earlier evaluation of the base alone found; None unless it is all there and was done
    with these settings.

    Args:
        fingerprint: of the base.
    """
    target = _result_folder(config, None)
    scores = _kept_scores(target, inputs, _model_facts(config, None, fingerprint))
    found = {name: score for name, score in scores.items() if score is not None}
    return EvaluationReport(found, 0.0, fingerprint, target) if len(found) == len(scores) else None


def _kept_scores(
    target: Path, inputs: EvaluationInputs, facts: Mapping[str, Any]
) -> dict[str, Score | None]:
    """Scores of the same weights on the same data with the same settings, where there are any."""
    return {
        name: _kept(_scores_file(target, name), {**facts, **case.facts})
        for name, case in inputs.cases.items()
    }


def load_tuned(
    model: str | Path, adapter: str | Path | None, dtype: DTypeLike, mesh: Mesh | None
) -> LoadedBase:
    """A model with an adapter merged into it, if there is one.

    Raises:
        InputError: see `load_base` and `apply_adapter`.
    """
    opened = None
    if adapter is not None:
        opened = load_adapter(adapter)
        opened.check(open_source(model).config)  # before weights are read
    base = load_base(model, dtype, mesh)
    if opened is not None:
        apply_adapter(base.model, opened, base.fingerprint if opened.manifest else None)
    return base


def _evaluate(
    config: RunConfig,
    model: Transformer,
    inputs: EvaluationInputs,
    name: str,
    folder: Path,
    facts: Mapping[str, Any],
) -> Score:
    """Evaluate one case and write down what came out."""
    begin, evaluation, case = time.perf_counter(), config.evaluation, inputs.cases[name]
    result = None
    if case.rows:
        hidden = None if jax.process_index() == 0 else True  # None: shown on terminals only
        with tqdm(total=len(case.rows), desc=f"evaluate {name}", disable=hidden) as bar:
            result = evaluate_task(
                model,
                inputs.tokenizer,
                case.rows,
                case.metric,
                judge=inputs.judge,
                max_new_tokens=case.max_new_tokens,
                temperature=evaluation.temperature,
                top_p=evaluation.top_p,
                seed=config.seed,
                batch_size=evaluation.batch_size,
                advance=bar.update,
            )
    heldout = None
    if case.heldout is not None:
        heldout = heldout_loss(model, case.heldout, evaluation.batch_size)
    score = Score(
        None if result is None else result.metric,
        None if result is None else result.value,
        len(case.rows),
        0 if result is None else result.failures,
        heldout,
    )
    if jax.process_index() == 0:
        target, completions = folder / "scores.json", folder / "completions.jsonl"
        for old in (target, completions):
            old.unlink(missing_ok=True)  # never beside what belongs to another score
        if result is not None:
            write_completions(completions, result.completions)
        content = dataclasses.asdict(score) | {"seconds": time.perf_counter() - begin}
        content |= {**facts, **case.facts}
        write_text_atomic(target, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return score


def _kept(path: Path, facts: Mapping[str, Any]) -> Score | None:
    """The score in a file, if there is one and it depends on just these facts."""
    if not path.exists():
        return None
    content = parse_json(read_text(path), str(path))
    if not isinstance(content, dict) or any(content.get(k) != v for k, v in facts.items()):
        return None
    try:
        score = {field.name: content[field.name] for field in dataclasses.fields(Score)}
        heldout = score.pop("heldout")
        return Score(**score, heldout=None if heldout is None else HeldoutLoss(**heldout))
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: {error}; expected scores as `evaluate` writes them") from error


def _model_facts(config: RunConfig, adapter: str | Path | None, fingerprint: str) -> dict[str, Any]:
    return {
        "model": config.model,
        "base_fingerprint": fingerprint,
        "adapter": None if adapter is None else str(adapter),
        "adapter_sha256": None if adapter is None else _adapter_sha256(Path(adapter)),
        "dtype": config.dtype,
    }


def _adapter_sha256(folder: Path) -> str:
    """Of its tensors, and of what scales them if they are factors."""
    return _sha256([*sorted(folder.glob("*.safetensors")), folder / ADAPTER_CONFIG])


def _sha256(paths: Iterable[Path]) -> str:
    """Of names and contents of the files that exist."""
    digest = hashlib.sha256()
    for path in paths:
        if path.exists():
            digest.update(f"{path.name}:{source_sha256(str(path))}\n".encode())
    return digest.hexdigest()


def _result_folder(config: RunConfig, adapter: str | Path | None) -> Path:
    run = RunFolder(config.output)
    if adapter is not None:
        name = run.adapter.name
    else:
        name = run.model.name if Path(config.model) == run.model else "base"
    return run.evaluation / name


def _scores_file(target: Path, name: str) -> Path:
    return (target if name == OWN else target / name) / "scores.json"
