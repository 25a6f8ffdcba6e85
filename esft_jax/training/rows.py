"""The rows that a run reads: of its task, mixed with other sources, held out, to score on."""

import bisect
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pydantic

from esft_jax import strict_yaml
from esft_jax.config import OtherConfig, RunConfig
from esft_jax.data.mix import MixedDataset, MixedSource
from esft_jax.data.pipeline import Dataset, PackedDataset, pack
from esft_jax.data.token_cache import TokenCache
from esft_jax.data.tokenizer import Tokenizer
from esft_jax.data.tokens import TokenizedData, tokenize
from esft_jax.data_config import DataConfig, SourceConfig
from esft_jax.errors import InputError
from esft_jax.selection_config import ScoreConfig

# Passes over data from which on a run is told that it repeats them.
_MANY = 10
_MOST_STEPS = 2**31 - 1


def read_rows(
    data: DataConfig, tokenizer: Tokenizer, seed: int
) -> tuple[PackedDataset, Dataset, dict[str, PackedDataset]]:
    """`task_set`, `train_set` and `valid_sets` of a `Setup`.

    Raises:
        InputError: naming file and line.
    """
    packed = _packing(data, tokenizer, seed)
    sources: list[MixedSource] = []
    valid_sets: dict[str, PackedDataset] = {}
    named: dict[str, DataConfig | SourceConfig] = {"task": data, **data.mix}
    for name, source in named.items():
        section = "data" if source is data else f"data.mix.{name}"
        train, held_out = _parts(source, data, tokenizer, section)
        weight = source.weight if isinstance(source, SourceConfig) else 1.0
        sources.append(MixedSource(name, weight, packed(train)))
        if held_out is not None:
            valid_sets[name] = packed(held_out)
    task_set = sources[0].dataset
    train_set: Dataset = MixedDataset(tuple(sources)) if data.mix else task_set
    return task_set, train_set, valid_sets


def held_out_rows(
    source: DataConfig | OtherConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    seed: int,
    section: str = "data",
) -> PackedDataset | None:
    """The rows of `valid` of a section, packed as `data` says; None without any.

    Raises:
        InputError: naming file and line.
    """
    found = _held_out(source, data, tokenizer, section)
    return None if found is None else _packing(data, tokenizer, seed)(found)


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
    tokens, key = task_set.data, "score.sequence_length"
    longest = int(tokens.documents.lengths.max()) - 1  # the last token is only a target
    if tokens.format.is_chat and data.too_long == "error" and longest > length:
        raise InputError(
            f"{key}: {length} tokens; the longest chat of data.train needs {longest}; expected at "
            "least that, or data.too_long: cut or drop"
        )
    return pack(tokens, tokenizer.pad_id, length, data.too_long, seed, key)


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
    tokens = tokenize(
        score.general,
        tokenizer,
        score.general_format,
        format_key="score.general_format",
        cache=_cache(data),
    )
    length, key = score.sequence_length, "score.sequence_length"
    return pack(tokens, tokenizer.pad_id, length, data.too_long, seed, key)


def count_steps(config: RunConfig, train_set: Dataset) -> RunConfig:
    """The same run with the updates that `train.epochs` stands for.

    Raises:
        InputError: they are too many, or do not fit to other settings.
    """
    train = config.train
    if train.epochs is None:
        return config
    rows, epochs = train.batch_size, train.epochs
    # Of the task; as decimals are stored, three passes may end a hair before 3.
    steps = 1 + bisect.bisect_left(
        range(1, _MOST_STEPS), epochs - 1e-6, key=lambda n: train_set.epochs(n * rows)["epoch"]
    )
    try:
        return replace(config, train=replace(train, steps=steps, epochs=None))
    except pydantic.ValidationError as error:
        wrong = strict_yaml.explain(error.errors(include_url=False)[0])
        raise InputError(f"train.epochs: {epochs:g} are {steps} steps; {wrong}") from None


def describe_passes(config: RunConfig, train_set: Dataset) -> str:
    """How often a run goes through its data."""
    train = config.train
    passes = train_set.epochs(train.steps * train.batch_size)
    task = passes.pop("epoch")
    others = {name.removeprefix("epoch/"): count for name, count in passes.items()}
    others.pop("task", None)
    said = [f"{task:.3g} over data.train", *(f"{n:.3g} over {name}" for name, n in others.items())]
    line = f"{train.steps:,} updates of {train.batch_size:,} rows: passes {', '.join(said)}"
    if max(task, *others.values(), 0) <= _MANY:
        return line
    return (
        f"{line}; warning: data that are repeated more than {_MANY} times are learned by heart; "
        "fewer train.steps, or train.epochs, or more data"
    )


def _parts(
    source: DataConfig | SourceConfig, data: DataConfig, tokenizer: Tokenizer, section: str
) -> tuple[TokenizedData, TokenizedData | None]:
    """What a source is to teach, and what of it is held out."""
    tokens = _tokens(source.train, source, data, tokenizer, section)
    if isinstance(source.valid, float):
        return tokens.split(source.valid, f"{section}.valid")
    return tokens, _held_out(source, data, tokenizer, section)


def _held_out(
    source: DataConfig | SourceConfig | OtherConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    section: str,
) -> TokenizedData | None:
    if isinstance(source.valid, float):
        assert not isinstance(source, OtherConfig)
        return _parts(source, data, tokenizer, section)[1]
    if not source.valid:
        return None
    return _tokens(source.valid, source, data, tokenizer, section)


def _tokens(
    paths: tuple[str, ...],
    source: DataConfig | SourceConfig | OtherConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    section: str,
) -> TokenizedData:
    return tokenize(
        paths, tokenizer, source.format, source.columns, f"{section}.format", _cache(data)
    )


def _cache(data: DataConfig) -> TokenCache | None:
    return None if data.cache is None else TokenCache(data.cache)


def _packing(
    data: DataConfig, tokenizer: Tokenizer, seed: int
) -> Callable[[TokenizedData], PackedDataset]:
    """How the configuration packs tokens."""
    return partial(
        pack,
        pad_id=tokenizer.pad_id,
        sequence_length=data.sequence_length,
        too_long=data.too_long,
        seed=seed,
    )
