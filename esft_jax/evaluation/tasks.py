"""Tasks: prompts with accepted answers, completed by a model and judged by a metric."""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array
from tqdm import tqdm

from esft_jax.config import RunConfig
from esft_jax.data.pipeline import PackedDataset, build_dataset, eval_batches
from esft_jax.data.read import read_chat, source_sha256
from esft_jax.data.tokenizer import Message, Tokenizer
from esft_jax.errors import InputError
from esft_jax.evaluation.generate import (
    DecodingOptions,
    check_length,
    encode_text,
    generate_tokens,
)
from esft_jax.evaluation.metrics import METRICS, Completion, write_completions
from esft_jax.files import parse_json, read_text, write_text_atomic
from esft_jax.hf.adapter import apply_adapter, load_adapter
from esft_jax.hf.load import load_base, local_folder
from esft_jax.mesh import device_multiple, make_mesh, place_batch
from esft_jax.model.config import ModelConfig
from esft_jax.model.transformer import Transformer
from esft_jax.training.run_folder import RunFolder
from esft_jax.training.step import loss_sum


@dataclass(frozen=True)
class TaskRow:
    """One prompt of a task.

    Attributes:
        where: file and line it came from.
        prompt: its text, as completions files show it.
        messages: the chat that the model answers; None if `prompt` is a rendered chat already.
        answers: what counts as right, at least one.
    """

    where: str
    prompt: str
    messages: tuple[Message, ...] | None
    answers: tuple[str, ...]

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids after which the answer begins."""
        if self.messages is None:
            return encode_text(tokenizer, self.prompt)
        return tokenizer.encode_prompt(self.messages)


@dataclass(frozen=True)
class EvaluationResult:
    """Completions of a task: `value` is the metric over all of them, in percent."""

    metric: str
    value: float
    completions: list[Completion]


@dataclass(frozen=True)
class HeldoutLoss:
    """Mean loss over a dataset.

    Attributes:
        tokens: tokens with a loss.
        nats_per_token: mean cross-entropy.
        bits_per_byte: the same per UTF-8 byte of text; None for chats, whose loss covers only a
            part of the text.
    """

    tokens: int
    nats_per_token: float
    bits_per_byte: float | None


@dataclass(frozen=True)
class EvaluationReport:
    """What `run_evaluation` found and wrote.

    Attributes:
        metric: name of the metric.
        value: the metric, in percent.
        rows: completions it is computed from.
        heldout: loss on `data.valid`; None without such data.
        seconds: spent, loading included.
        folder: holds `completions.jsonl` and `scores.json`.
    """

    metric: str
    value: float
    rows: int
    heldout: HeldoutLoss | None
    seconds: float
    folder: Path


def read_task(path: str | Path) -> list[TaskRow]:
    """Read a task's evaluation rows, all of one kind.

    Either `{"prompt", "raw_answers": [...]}`, JSON lines as in the reference, whose prompts may be
    chats rendered already ("User: ...Assistant:"); or chats `{"messages": [...]}` as in training,
    whose last message is the answer.

    Raises:
        InputError: naming file, line and key.
    """
    lines = _prompt_lines(path)
    if lines is None:
        return [_chat_row(example.where, example.messages) for example in read_chat([str(path)])]
    rows = [_prompt_row(where, record) for where, record in lines]
    if not rows:
        raise InputError(f"{path}: holds no examples; expected at least one")
    return rows


def _prompt_lines(path: str | Path) -> list[tuple[str, Any]] | None:
    """Records of a JSON Lines file; None if the path is anything else, or holds chats."""
    if Path(path).suffix != ".jsonl":
        return None
    # Not splitlines: it also splits at separators that JSON strings may hold unescaped.
    numbered = enumerate(read_text(path).split("\n"), start=1)
    lines = [(f"{path}:{number}", text) for number, text in numbered if text.strip()]
    records: list[tuple[str, Any]] = []
    for where, text in lines:
        record = parse_json(text, where)
        if not records and isinstance(record, dict) and "messages" in record:
            return None
        records.append((where, record))
    return records


def _prompt_row(where: str, record: Any) -> TaskRow:
    if not isinstance(record, dict):
        raise InputError(f'{where}: expected an object {{"prompt", "raw_answers"}}')
    prompt, answers = record.get("prompt"), record.get("raw_answers")
    if not isinstance(prompt, str) or not prompt:
        raise InputError(f"{where}: prompt: expected a text that is not empty")
    if not isinstance(answers, list) or not answers:
        raise InputError(f"{where}: raw_answers: expected a list of at least one text")
    if not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{where}: raw_answers: expected texts only")
    rendered = prompt.startswith("User: ") and prompt.endswith("\n\nAssistant:")
    messages = None if rendered else (Message(role="user", content=prompt),)
    return TaskRow(where, prompt, messages, tuple(answers))


def _chat_row(where: str, messages: Sequence[Message]) -> TaskRow:
    *turns, answer = messages
    if answer["role"] != "assistant" or not turns:
        raise InputError(
            f"{where}: messages: expected a prompt, and the assistant's answer as the last message"
        )
    prompt = "\n\n".join(turn["content"] for turn in turns)
    return TaskRow(where, prompt, tuple(turns), (answer["content"],))


def check_task(
    rows: Sequence[TaskRow],
    tokenizer: Tokenizer,
    metric: str,
    max_new_tokens: int,
    max_positions: int,
) -> list[list[int]]:
    """The prompts' token ids, once all of them fit the model and all answers the metric.

    Raises:
        InputError: naming the row.
    """
    for row in rows:
        METRICS[metric].check(row.answers, row.where)
    prompts = [row.encode(tokenizer) for row in rows]
    for row, prompt in zip(rows, prompts, strict=True):
        check_length(f"{row.where}: prompt", len(prompt), max_new_tokens, max_positions)
    return prompts


def evaluate_task(
    model: Transformer,
    tokenizer: Tokenizer,
    rows: Sequence[TaskRow],
    metric: str,
    *,
    max_new_tokens: int = 128,
    **options: Unpack[DecodingOptions],
) -> EvaluationResult:
    """Complete every prompt and judge the completions.

    Args:
        metric: a name in `esft_jax.evaluation.metrics.METRICS`.
        max_new_tokens: tokens per completion, at most.
        options: see `generate_tokens`.

    Raises:
        InputError: see `check_task`; before any compute.
    """
    limit = model.config.max_positions
    prompts = check_task(rows, tokenizer, metric, max_new_tokens, limit)
    new = generate_tokens(
        model, prompts, eos_id=tokenizer.eos_id, max_new_tokens=max_new_tokens, **options
    )
    texts = [tokenizer.decode(ids) for ids in new]
    result = METRICS[metric].score(texts, [row.answers for row in rows])
    completions = [
        Completion(row.prompt, text, row.answers, score)
        for row, text, score in zip(rows, texts, result.per_example, strict=True)
    ]
    return EvaluationResult(metric, result.aggregate, completions)


def heldout_loss(model: Transformer, dataset: PackedDataset, batch_size: int) -> HeldoutLoss:
    """Mean loss of a model over a dataset.

    Args:
        batch_size: packed rows per forward pass, over all devices; rounded up to a multiple of
            their number.
    """
    graph, params = nnx.split(model)

    @jax.jit
    def batch_loss(params: nnx.State, batch: dict[str, Array]) -> tuple[Array, Array]:
        return loss_sum(nnx.merge(graph, params), batch)[0], batch["loss_weights"].sum()

    size = device_multiple(batch_size, model.mesh)
    nats = tokens = 0.0
    for batch in eval_batches(dataset, size, jax.process_index(), jax.process_count()):
        loss, weight = batch_loss(params, place_batch(batch, model.mesh))
        nats, tokens = nats + float(loss), tokens + float(weight)
    text_bytes = dataset.stats.text_bytes
    bits_per_byte = nats / math.log(2) / text_bytes if text_bytes else None
    return HeldoutLoss(int(tokens), nats / tokens, bits_per_byte)


@dataclass(frozen=True)
class EvaluationInputs:
    """What an evaluation reads, except weights; see `check_evaluation`."""

    tokenizer: Tokenizer
    mesh: Mesh
    rows: list[TaskRow]
    valid_set: PackedDataset | None


def check_evaluation(config: RunConfig) -> EvaluationInputs:
    """Read everything but weights, and check that it fits together.

    Raises:
        InputError: naming the key, file or line that is wrong.
    """
    evaluation = config.evaluation
    if evaluation.data is None:
        raise InputError("evaluation.data: not set; expected a file of prompts and answers")
    RunFolder(config.output).check_writable()
    folder = local_folder(config.model)
    shape, tokenizer = ModelConfig.load(folder), Tokenizer.load(folder)
    tokenizer.check_vocabulary(shape.vocab_size)
    mesh = make_mesh(config.mesh.data, config.mesh.expert)
    rows = read_task(evaluation.data)[: evaluation.limit]
    limit = shape.max_positions
    check_task(rows, tokenizer, evaluation.metric, evaluation.max_new_tokens, limit)
    return EvaluationInputs(tokenizer, mesh, rows, _valid_set(config, shape, tokenizer))


def run_evaluation(config: RunConfig, adapter: str | Path | None = None) -> EvaluationReport:
    """Evaluate a configuration's model, alone or with an adapter, on its task and valid data.

    Writes `completions.jsonl` (the reference's format) and `scores.json` to
    `{output}/evaluation/{base,adapter,model}`; `model` is the run's own result of full training.

    Raises:
        InputError: model, adapter or data do not fit the configuration; before any compute.
    """
    begin = time.perf_counter()
    evaluation, inputs = config.evaluation, check_evaluation(config)
    rows, valid_set = inputs.rows, inputs.valid_set
    model = load_tuned(config.model, adapter, jnp.dtype(config.dtype), inputs.mesh)
    target = _result_folder(config, adapter)
    hidden = None if jax.process_index() == 0 else True  # None: shown on terminals only
    with tqdm(total=len(rows), desc=f"evaluate {target.name}", disable=hidden) as bar:
        result = evaluate_task(
            model,
            inputs.tokenizer,
            rows,
            evaluation.metric,
            max_new_tokens=evaluation.max_new_tokens,
            temperature=evaluation.temperature,
            top_p=evaluation.top_p,
            seed=config.seed,
            batch_size=evaluation.batch_size,
            advance=bar.update,
        )
    heldout = None if valid_set is None else heldout_loss(model, valid_set, evaluation.batch_size)
    seconds = time.perf_counter() - begin
    report = EvaluationReport(result.metric, result.value, len(rows), heldout, seconds, target)
    if jax.process_index() == 0:
        _write(config, adapter, report, result.completions, valid_set)
    return report


def _valid_set(config: RunConfig, shape: ModelConfig, tokenizer: Tokenizer) -> PackedDataset | None:
    data = config.data
    if not data.valid:
        return None
    if data.sequence_length > shape.max_positions:
        raise InputError(
            f"data.sequence_length: {data.sequence_length} tokens; the model's limit is "
            f"{shape.max_positions} (max_position_embeddings)"
        )
    return build_dataset(
        data.valid,
        tokenizer,
        format=data.format,
        sequence_length=data.sequence_length,
        too_long=data.too_long,
        seed=config.seed,
    )


def load_tuned(
    model: str | Path, adapter: str | Path | None, dtype: DTypeLike, mesh: Mesh | None
) -> Transformer:
    """A model with an adapter merged into it, if there is one.

    Raises:
        InputError: see `load_base` and `apply_adapter`.
    """
    opened = None if adapter is None else load_adapter(adapter)
    base = load_base(model, dtype, mesh)
    if opened is not None:
        apply_adapter(base.model, opened, base.fingerprint if opened.manifest else None)
    return base.model


def _result_folder(config: RunConfig, adapter: str | Path | None) -> Path:
    run = RunFolder(config.output)
    if adapter is not None:
        name = run.adapter.name
    else:
        name = run.model.name if Path(config.model) == run.model else "base"
    return run.evaluation / name


def _write(
    config: RunConfig,
    adapter: str | Path | None,
    report: EvaluationReport,
    completions: Sequence[Completion],
    valid_set: PackedDataset | None,
) -> None:
    evaluation = config.evaluation
    assert evaluation.data is not None
    scores = report.folder / "scores.json"
    scores.unlink(missing_ok=True)  # never beside the completions of another run
    write_completions(report.folder / "completions.jsonl", completions)
    sources = {evaluation.data: source_sha256(evaluation.data)}
    content = {
        "metric": report.metric,
        "value": report.value,
        "rows": report.rows,
        "heldout": None if report.heldout is None else dataclasses.asdict(report.heldout),
        "seconds": report.seconds,
        "model": config.model,
        "adapter": None if adapter is None else str(adapter),
        "dtype": config.dtype,
        "max_new_tokens": evaluation.max_new_tokens,
        "temperature": evaluation.temperature,
        "top_p": evaluation.top_p,
        "seed": config.seed,
        "data_sha256": sources | ({} if valid_set is None else valid_set.stats.sha256),
    }
    write_text_atomic(scores, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
