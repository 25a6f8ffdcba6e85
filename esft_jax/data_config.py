"""The section `data`: training and validation examples."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    WrapValidator,
)
from pydantic.dataclasses import dataclass

from esft_jax.data.formats import check_columns
from esft_jax.files import local_path
from esft_jax.values import (
    FormatName,
    Length,
    LocalPath,
    Name,
    Positive,
    TemplateArguments,
    Text,
    distinct_names,
)

_STRICT = ConfigDict(extra="forbid")


# Files, or a share of the training examples.
_Paths = tuple[LocalPath, ...]
_PATHS = TypeAdapter(_Paths)


def _paths_or_share(value: object, _: object) -> tuple[str, ...] | float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _PATHS.validate_python(value)
    if not 0 < value < 1:
        raise ValueError(
            f"expected a list, or a share of the training examples between 0 and 1, got {value}"
        )
    return value


def _checked_path(path: str) -> str:
    local_path(path)  # as it was written: who uses it expands `~`
    return path


_Folder = Annotated[Text, AfterValidator(_checked_path)]
_Valid = Annotated[_Paths | float, WrapValidator(_paths_or_share)]


@dataclass(frozen=True, config=_STRICT)
class SourceConfig:
    """Examples that are mixed into those of the task.

    Attributes:
        train: As `data.train`.
        valid: As `data.valid`.
        format: As `data.format`.
        columns: As `data.columns`.
        weight: Packed rows of this source for each one of `data.train`.
    """

    train: Annotated[_Paths, Field(min_length=1)]
    valid: _Valid = ()
    format: FormatName | None = None
    columns: dict[str, Text] = field(default_factory=dict)
    weight: Positive = 1.0


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """Training and validation examples.

    Attributes:
        train: Files (JSONL, JSON, CSV, Parquet; compressed too), folders or patterns of them, or
            datasets of the hub (`owner/name[/configuration][:split][@revision]`).
        valid: The held-out split, for the evaluation loss: as `train`, or a share of the examples
            in `train`, such as 0.05, which are not trained on then; may be empty.
        format: Of the records: `messages`, `sharegpt`, `alpaca`, `prompt_completion`,
            `question_answer` or `text`; none recognises it by the first ones.
        columns: Keys of the records that differ from those of the format, such as
            `{messages: dialogue}`.
        sequence_length: Tokens per packed row.
        too_long: What to do with a chat longer than a row: stop, cut its end, or drop it.
        chat_template: File of a chat template, instead of the model's.
        template_arguments: What the chat template is given besides the chat, such as
            `enable_thinking: false`; it has to read all of them.
        stop_token: What ends an answer, and generation with it, where the chat template writes no
            stop token there.
        cache: Folder where the tokens of large data are kept for later starts; none keeps none.
        mix: Other sources to train on, by name, such as the alignment data of the model; experts
            are scored on `train` alone.
    """

    train: Annotated[_Paths, Field(min_length=1)]
    valid: _Valid = ()
    format: FormatName | None = None
    columns: dict[str, Text] = field(default_factory=dict)
    sequence_length: Length = 4096
    too_long: Literal["error", "cut", "drop"] = "error"
    chat_template: LocalPath | None = None
    template_arguments: TemplateArguments = field(default_factory=dict)
    stop_token: Text | None = None
    cache: _Folder | None = "~/.cache/esft_jax/tokens"
    mix: Annotated[dict[Name, SourceConfig], AfterValidator(distinct_names)] = field(
        default_factory=dict
    )

    @property
    def source_names(self) -> tuple[str, ...]:
        """`task` for what is not in `mix`, and the names there."""
        return ("task", *self.mix)

    def problem(self) -> str | None:
        """What does not fit together, starting with the key to change."""
        if mistake := check_columns(self.format, self.columns):
            return f"data.columns: {mistake}"
        for name, source in self.mix.items():
            if mistake := check_columns(source.format, source.columns):
                return f"data.mix.{name}.columns: {mistake}"
            if source.valid and not self.valid:
                return f"data.mix.{name}.valid: needs data.valid, which chooses the best step"
        return None
