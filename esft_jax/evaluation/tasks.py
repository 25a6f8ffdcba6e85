"""Tasks: prompts with accepted answers, completed by a model and judged by a metric."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import jax
from flax import nnx
from jaxtyping import Array, Float

from esft_jax.data.batch import Batch
from esft_jax.data.chat import Message
from esft_jax.data.formats import MESSAGES, RecordFormat, fitting
from esft_jax.data.layouts import check_record_keys, layout, says_nothing, short
from esft_jax.data.pipeline import PackedDataset, eval_batches
from esft_jax.data.read import chat_example, checked_text
from esft_jax.data.records import read_records
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.decode.generation import DecodingOptions, check_length, generate_tokens
from esft_jax.errors import InputError
from esft_jax.evaluation.judge import Judge
from esft_jax.evaluation.metrics import METRICS, Completion
from esft_jax.model.transformer import Transformer
from esft_jax.progress import progress_over
from esft_jax.sharding import device_multiple, place_batch
from esft_jax.training.step import token_loss


@dataclass(frozen=True)
class TaskRow:
    """One prompt of a task.

    Attributes:
        where: file and line it came from.
        prompt: its text, as completions files show it.
        messages: the chat that the model answers; None if `prompt` is what a user says, or a
            rendered chat already (see `Tokenizer.encode_user`).
        answers: what counts as right, at least one.
        tools: those of `messages`.
    """

    where: str
    prompt: str
    messages: tuple[Message, ...] | None
    answers: tuple[str, ...]
    tools: list[dict[str, Any]] | None = None

    def encode(self, tokenizer: Tokenizer) -> list[int]:
        """Token ids after which the answer begins; an `InputError` begins with `where`."""
        try:
            if self.messages is None:
                return tokenizer.encode_user(self.prompt)
            return tokenizer.encode_prompt(self.messages, self.tools)
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from error

    def accepted(self, tokenizer: Tokenizer) -> tuple[str, ...]:
        """The answers as completions can be: without the EOS that some data sets write."""
        return tuple(map(tokenizer.bare, self.answers))


@dataclass(frozen=True)
class EvaluationResult:
    """Completions of a task.

    Attributes:
        metric: its label, see `Metric.label`.
        value: the metric over all of them, in percent.
        failures: completions that the judge gave no readable score; they are not in `value`.
    """

    metric: str
    value: float
    failures: int
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


def read_task(path: str | Path) -> list[TaskRow]:
    """Read a task's evaluation rows, from what training data may be read from too.

    Each is either `{"prompt", "raw_answers": [...]}` as in the reference, whose prompt may be a
    chat rendered already; or a chat in one of the formats of training, which is recognised, and
    whose last message is the answer.

    Raises:
        InputError: naming file, line and key.
    """
    return [_row(where, record) for where, record in read_records([str(path)])]


def _row(where: str, record: dict[str, Any]) -> TaskRow:
    if record.get("messages") is not None:
        return _chat_row(where, record, MESSAGES)
    formats = [] if "raw_answers" in record else fitting([record])
    if len(formats) == 1 and formats[0].is_chat:
        return _chat_row(where, record, formats[0])
    return _prompt_row(where, record)


def _prompt_row(where: str, record: dict[str, Any]) -> TaskRow:
    prompt, answers = record.get("prompt"), record.get("raw_answers")
    if prompt is None:
        raise InputError(
            f'{where}: prompt: missing; expected {{"prompt", "raw_answers"}} or {{"messages"}}; '
            f"{layout(record)}"
        )
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where}: prompt: is {short(prompt)}; expected a text that is not empty")
    if answers is None:
        raise InputError(
            f"{where}: raw_answers: missing; expected a list of at least one text; {layout(record)}"
        )
    if not isinstance(answers, list) or not answers:
        raise InputError(
            f"{where}: raw_answers: is {short(answers)}; expected a list of at least one text"
        )
    checked_text(where, "prompt", prompt)
    for number, answer in enumerate(answers):
        checked_text(where, f"raw_answers[{number}]", answer)
    check_record_keys(where, record, "prompt", [prompt])
    return TaskRow(where, prompt, None, tuple(answers))


def _chat_row(where: str, record: dict[str, Any], format: RecordFormat) -> TaskRow:
    example, key = chat_example(where, record, format), format.answer_key
    *turns, answer = example.messages
    if answer["role"] != "assistant" or not turns:
        raise InputError(
            f"{where}: {key}: expected a prompt, and the assistant's answer as the last message"
        )
    if not answer.get("mask", True):
        raise InputError(
            f"{where}: {key}[{len(turns)}].mask: is false on the answer; expected an answer "
            "that counts as right"
        )
    if "tool_calls" in answer:
        raise InputError(
            f"{where}: {key}[{len(turns)}].tool_calls: is {short(answer['tool_calls'])} on the "
            "answer; metrics compare texts; expected an answer without calls"
        )
    if not says_nothing(record.get("raw_answers")):
        raise InputError(
            f"{where}: raw_answers: is {short(record['raw_answers'])} beside {key}, whose last "
            "one is the answer; expected one of them"
        )
    prompt = "\n\n".join(turn["content"] for turn in turns)
    return TaskRow(where, prompt, tuple(turns), (answer["content"],), example.tools)


def check_task(
    rows: Sequence[TaskRow],
    tokenizer: Tokenizer,
    metric: str,
    max_new_tokens: int,
    max_positions: int,
) -> list[list[int]]:
    """The prompts' token ids, once all of them fit the model and all answers the metric.

    Raises:
        InputError: naming the row, or the file.
    """
    chosen = METRICS[metric]
    answers = [row.accepted(tokenizer) for row in rows]
    for row, accepted in zip(rows, answers, strict=True):
        chosen.check(accepted, row.where)
    try:
        chosen.label(answers) if rows else None
    except InputError as error:
        raise InputError(f"{rows[0].where.rpartition(':')[0]}: {error}") from None
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
    judge: Judge | None = None,
    max_new_tokens: int = 128,
    **options: Unpack[DecodingOptions],
) -> EvaluationResult:
    """Complete every prompt and judge the completions.

    Args:
        metric: a name in `esft_jax.evaluation.metrics.METRICS`.
        judge: for the metrics that need one.
        max_new_tokens: tokens per completion, at most.
        options: see `generate_tokens`.

    Raises:
        InputError: see `check_task`, before any compute; and `Judge.score`.
    """
    limit = model.config.max_positions
    prompts = check_task(rows, tokenizer, metric, max_new_tokens, limit)
    new = generate_tokens(
        model, prompts, stop_ids=tokenizer.stop_ids, max_new_tokens=max_new_tokens, **options
    )
    texts = list(map(tokenizer.answer, new))
    chosen, answers = METRICS[metric], [row.accepted(tokenizer) for row in rows]
    if chosen.rubric is None:
        result = chosen.score(texts, answers)
    else:
        assert judge is not None
        result = judge.score(chosen.rubric, [row.prompt for row in rows], texts, answers)
    completions = [
        Completion(row.prompt, text, accepted, score)
        for row, text, accepted, score in zip(rows, texts, answers, result.per_example, strict=True)
    ]
    return EvaluationResult(chosen.label(answers), result.aggregate, result.failures, completions)


def heldout_loss(
    model: Transformer, dataset: PackedDataset, batch_size: int, what: str = "held out"
) -> HeldoutLoss:
    """Mean loss of a model over a dataset.

    Args:
        batch_size: packed rows per forward pass, over all devices; rounded up to a multiple of
            their number.
        what: the progress bar says.
    """
    graph, params = nnx.split(model)
    size = device_multiple(min(batch_size, len(dataset)), model.mesh)
    nats = tokens = 0.0
    batches = eval_batches(dataset, size, jax.process_index(), jax.process_count())
    for batch in progress_over(batches, what, math.ceil(len(dataset) / size)):
        loss, weight = _batch_loss(graph, params, place_batch(batch, model.mesh))
        nats, tokens = nats + float(loss), tokens + float(weight)
    text_bytes = dataset.stats.text_bytes
    bits_per_byte = nats / math.log(2) / text_bytes if text_bytes else None
    return HeldoutLoss(int(tokens), nats / tokens, bits_per_byte)


@partial(jax.jit, static_argnames=("graph",))
def _batch_loss(
    graph: nnx.GraphDef, params: nnx.State, batch: Batch
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sums of losses in nats and of their weights; compiled once for all datasets of one shape."""
    return token_loss(nnx.merge(graph, params), batch)
