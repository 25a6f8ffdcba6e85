"""How frozen weights may be kept. Configurations read it, so it imports no JAX."""

from dataclasses import dataclass
from typing import Literal

Scheme = Literal["int8", "int4", "mxfp4", "fp8"]


@dataclass(frozen=True)
class Quantisation:
    """What is kept how.

    Attributes:
        experts: scheme of the matrices of routed experts; None keeps them as they are.
        rest: the same of those of attention, dense MLPs and shared experts.
        group_size: inputs that share a scale; those of MXFP4 and fp8 are as published.
    """

    experts: Scheme | None = None
    rest: Literal["int8", "fp8"] | None = None
    group_size: int = 64
