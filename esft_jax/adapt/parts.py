"""Parts of a network that can be trained beside selected experts, as rules on roles.

Configurations import this module: it imports no JAX, so that roles are their values
(`model.params.Role`) here.
"""

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, cast, get_args

from esft_jax.errors import InputError, shown

Part = Literal[
    "shared_experts",
    "router",
    "attention",
    "norms",
    "dense_mlps",
    "embedding",
    "head",
    "non_expert_modules",
]
RatePart = Literal["experts", Part]

_OTHERS = {
    "router": "router",
    "attention": "attention",
    "norms": "norm",
    "dense_mlps": "dense_mlp",
    "embedding": "embedding",
    "head": "head",
}
# A role belongs to the first part that has it. Constants (`model.params.CONSTANTS`) belong to none:
# no method trains them.
PARTS: Mapping[str, frozenset[str]] = {
    "shared_experts": frozenset({"shared_expert"}),
    **{part: frozenset({role}) for part, role in _OTHERS.items()},
    "non_expert_modules": frozenset(_OTHERS.values()),
}
# Those that have a key of their own in the reference's files.
FLAGS: tuple[Part, ...] = ("shared_experts", "non_expert_modules")
# What can have a learning rate of its own.
RATE_PARTS: Mapping[str, frozenset[str]] = {"experts": frozenset({"routed_expert"}), **PARTS}


def ordered(parts: Iterable[str]) -> tuple[Part, ...]:
    """Each of them once, in the order of `PARTS`; `non_expert_modules` includes the others."""
    named = set(parts)
    if "non_expert_modules" in named:
        named -= _OTHERS.keys()
    return tuple(part for part in get_args(Part) if part in named)


def roles_of(parts: Iterable[str]) -> frozenset[str]:
    """The roles of all parameters in some parts."""
    return frozenset().union(*(RATE_PARTS[part] for part in parts))


def part_of(role: str, parts: Collection[str]) -> RatePart | None:
    """The first part, in the order of `RATE_PARTS`, that a role belongs to; None: to none."""
    found = (part for part, roles in RATE_PARTS.items() if part in parts and role in roles)
    return cast(RatePart | None, next(found, None))


def check_also(parts: Iterable[str], roles: Collection[str], where: str) -> None:
    """Check that a model has every part.

    Args:
        roles: of the model's parameters.
        where: what the message begins with.

    Raises:
        InputError: naming the first part that it does not have.
    """
    _check(parts, PARTS, roles, where, "the model has no such parameters")


def check_rates(parts: Iterable[str], roles: Collection[str]) -> None:
    """Check that every part with a learning rate of its own is trained.

    Args:
        roles: of the parameters that are trained.

    Raises:
        InputError: naming the first part that is not trained.
    """
    _check(parts, RATE_PARTS, roles, "optimizer.rates", "it is not trained")


def _check(
    parts: Iterable[str],
    rules: Mapping[str, frozenset[str]],
    roles: Collection[str],
    where: str,
    problem: str,
) -> None:
    for part in parts:
        if rules[part].isdisjoint(roles):
            there = ", ".join(name for name, its in rules.items() if not its.isdisjoint(roles))
            raise InputError(f"{where}: {part}: {problem}; expected some of {there}")


def known_part(name: Any, parts: Iterable[str] = PARTS) -> Any:
    """The name of a part; a `ValueError` for any other."""
    known = tuple(parts)
    if name not in known:
        nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0)[0]
        raise ValueError(
            f"unknown part {shown(name)}; did you mean {nearest}? Expected some of "
            f"{', '.join(known)}"
        )
    return name


def merge_flags(also: Iterable[str], flags: Mapping[str, Any]) -> tuple[Part, ...]:
    """Parts, with those that a flag of the same name says are trained.

    Raises:
        ValueError: a flag is neither true nor false, or false for a part that is named.
    """
    named = list(also)
    for flag, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"key {flag!r} must be true or false, not {shown(value)}")
        if value:
            named.append(flag)
        elif flag in named:
            raise ValueError(f"key {flag!r} is false, but also names it; expected one of them")
    return ordered(named)
