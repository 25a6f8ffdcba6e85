"""The rows that a run reads: of its task, mixed with other sources, held out, to score on."""

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from esft_jax.config import DataConfig
from esft_jax.data.mix import MixedDataset, MixedSource
from esft_jax.data.pipeline import Dataset, PackedDataset, build_dataset
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.errors import InputError
from esft_jax.selection_config import ScoreConfig


def read_rows(
    data: DataConfig, tokenizer: Tokenizer, seed: int
) -> tuple[PackedDataset, Dataset, dict[str, PackedDataset]]:
    """`task_set`, `train_set` and `valid_sets` of a `Setup`.

    Raises:
        InputError: naming file and line.
    """
    pack = _packing(data, tokenizer, seed)
    task_set = pack(data.train)
    train_set: Dataset = task_set
    valid_sets = {"task": pack(data.valid)} if data.valid else {}
    if data.mix:
        sources = [MixedSource("task", 1.0, task_set)]
        for name, source in data.mix.items():
            sources.append(MixedSource(name, source.weight, pack(source.train)))
            if source.valid:
                valid_sets[name] = pack(source.valid)
        train_set = MixedDataset(tuple(sources))
    return task_set, train_set, valid_sets


def score_rows(
    task_set: PackedDataset, length: int, data: DataConfig, tokenizer: Tokenizer, seed: int
) -> PackedDataset:
    """The task's examples in rows to score experts on.

    Args:
        task_set: the same in rows to train on.
        length: tokens per row, `score.sequence_length`.

    Raises:
        InputError: rows are too short for the examples.
    """
    if length == task_set.sequence_length:
        return task_set
    longest = int(np.diff(task_set.documents.offsets).max()) - 1  # the last token is only a target
    if data.format == "chat" and data.too_long == "error" and longest > length:
        raise InputError(
            f"score.sequence_length: {length} tokens; the longest chat of data.train needs "
            f"{longest}; expected at least that, or data.too_long: cut or drop"
        )
    pack = _packing(data, tokenizer, seed)
    return pack(data.train, sequence_length=length, length_key="score.sequence_length")


def general_rows(
    score: ScoreConfig, data: DataConfig, tokenizer: Tokenizer, seed: int
) -> PackedDataset | None:
    """The general sample in rows as long as those of the task that experts are scored on; None if
    no files of one are named.

    Raises:
        InputError: naming file and line.
    """
    if not score.general:
        return None
    data = dataclasses.replace(data, format=score.general_format)
    pack = _packing(data, tokenizer, seed)
    length = score.sequence_length
    return pack(score.general, sequence_length=length, length_key="score.sequence_length")


def _packing(data: DataConfig, tokenizer: Tokenizer, seed: int) -> Callable[..., PackedDataset]:
    """`build_dataset` of the paths that it is given, as the configuration says."""
    return partial(
        build_dataset,
        tokenizer=tokenizer,
        format=data.format,
        sequence_length=data.sequence_length,
        too_long=data.too_long,
        seed=seed,
    )
