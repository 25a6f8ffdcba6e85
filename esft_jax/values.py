"""Values that configurations and options of commands are made of: strict, and in range.

pydantic checks them; what a message says of a wrong one follows from here.
"""

import re
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue

from esft_jax.data.formats import Format
from esft_jax.data.template_worker import GIVEN
from esft_jax.errors import shown
from esft_jax.files import local_path

Value = TypeVar("Value")

# `esft_jax.evaluation.metrics` has what they compute.
METRIC_NAMES = (
    *("intent", "exact_match", "chrf", "bleu", "rouge_l"),
    *("judge_summary", "judge_law", "judge_translation"),
)


def _known_metric(name: str) -> str:
    if name not in METRIC_NAMES:
        raise ValueError(f"expected one of {', '.join(METRIC_NAMES)}, got {name!r}")
    return name


def _argument_name(name: str) -> str:
    if not name.isidentifier() or name in GIVEN:
        raise ValueError(
            f"expected the name of a variable other than {', '.join(sorted(GIVEN))}, got "
            f"{shown(name)}"
        )
    return name


def _format_of_today(name: object) -> object:
    # Older files, and run folders, say `chat`.
    return "messages" if name == "chat" else name


def _plain_name(name: str) -> str:
    # It becomes the name of a folder, with a hash behind it, beside files that the package writes.
    taken = name.lower() == "task" or name.endswith((".json", ".jsonl"))
    if taken or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{,59}", name):
        raise ValueError(
            "expected a name of at most 60 letters, digits, '.', '-' and '_', other than task and "
            f"*.json, got {shown(name)}"
        )
    return name


def _of_32_bits(number: float) -> float:
    smallest, largest = 2.0**-126, 2.0**128 * (1 - 2.0**-24)
    if number and not smallest <= number <= largest:
        raise ValueError(
            f"expected a number that 32 bits hold, {smallest:.3g} to {largest:.3g}, got {number}"
        )
    return number


def distinct_names(named: dict[str, Value]) -> dict[str, Value]:
    """The same, if its keys differ in more than case.

    Raises:
        ValueError: naming two that do not.
    """
    seen: dict[str, str] = {}
    for name in named:
        if other := seen.get(name.lower()):
            # Some file systems would give both the same folder.
            raise ValueError(f"{other} and {name} differ in case alone; expected other names")
        seen[name.lower()] = name
    return named


Text = Annotated[str, Field(strict=True, min_length=1)]
LocalPath = Annotated[Text, AfterValidator(local_path)]
Flag = Annotated[bool, Field(strict=True)]
# Rows, steps, devices: JAX counts them in 32 bits.
Count = Annotated[int, Field(strict=True, ge=1, lt=2**31)]
CountOrZero = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Length = Annotated[int, Field(strict=True, ge=2, lt=2**31)]
Size = Annotated[int, Field(strict=True, ge=1, lt=2**63)]
# Numbers to compute with: JAX would take those out of range for 0 or infinity.
_Single = AfterValidator(_of_32_bits)
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False), _Single]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False), _Single]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Share = Annotated[float, Field(strict=True, gt=0, le=1)]
Decay = Annotated[float, Field(strict=True, ge=0, lt=1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]

FormatName = Annotated[Format, BeforeValidator(_format_of_today)]
TemplateArguments = dict[Annotated[Text, AfterValidator(_argument_name)], JsonValue]
# Names of sources and of what is evaluated become names of metrics and of folders.
Name = Annotated[Text, AfterValidator(_plain_name)]
MetricName = Annotated[Text, AfterValidator(_known_metric)]
