"""What a compiled step moves between devices, read from the text of its program (HLO)."""

import re
from dataclasses import dataclass, field
from functools import cache

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# The type is lazy: layouts hold parentheses, but no lower-case word before one.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLEE = re.compile(
    r"\b(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\bbranch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)


@dataclass
class _Computation:
    """Bytes received by kind in one run of it, and (computation, times) of those it calls."""

    received: dict[str, float] = field(default_factory=dict)
    calls: list[tuple[str, int]] = field(default_factory=list)


def received_bytes(text: str, devices: int) -> dict[str, float]:
    """Bytes that one device receives in a step, by kind of collective.

    Each counts as often as its loop runs, where the compiler knows how often, else once; the loop
    over pieces of assignments, which is not known, runs once for a balanced router. A ring is
    assumed: to gather or scatter N bytes over n devices, each receives N (n - 1) / n; to reduce
    them everywhere, twice that.

    Args:
        text: `jax.stages.Compiled.as_text()`.
        devices: of the whole program; a collective that names no groups is over all of them.
    """
    computations, entry = _read(text, devices)

    @cache
    def total(name: str) -> dict[str, float]:
        found = dict(computations[name].received)
        for callee, times in computations[name].calls:
            for kind, size in total(callee).items():
                found[kind] = found.get(kind, 0) + times * size
        return found

    return total(entry)


def _read(text: str, devices: int) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = _Computation()
            entry = name if header[1] else entry
        elif name and (instruction := _INSTRUCTION.match(line)):
            type_, operation, rest = instruction.groups()
            _add(computations[name], type_, operation, rest, devices)
    return computations, entry


def _add(computation: _Computation, type_: str, operation: str, rest: str, devices: int) -> None:
    kind = operation.removesuffix("-start")
    if kind in _KINDS:
        size = _received(kind, type_, operation.endswith("-start"), _group_size(rest, devices))
        computation.received[kind] = computation.received.get(kind, 0) + size
    elif not operation.endswith(("-done", "-update")):  # these name what `-start` has called
        trips = _TRIPS.search(rest)
        times = int(trips[1]) if trips else 1
        for callee, branches in _CALLEE.findall(rest):
            names = [callee] if callee else branches.replace("%", "").split(", ")
            computation.calls += [(name, times) for name in names]


def _received(kind: str, type_: str, started: bool, group: int) -> float:
    size = _bytes(type_)
    match kind:
        case "all-gather":
            # What starts one has its operand, a part of the result, in its type.
            whole = size * group / (group + 1) if started else size
            return whole * (group - 1) / group
        case "all-reduce":
            return 2 * size * (group - 1) / group
        case "reduce-scatter":
            part = size / (group + 1) if started else size
            return part * (group - 1)
        case "collective-permute":
            return size / 2 if started else size
    return size * (group - 1) / group


def _group_size(attributes: str, devices: int) -> int:
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    if shape := re.search(r"replica_groups=\[\d+,(\d+)\]<=", attributes):
        return int(shape[1])
    return devices


def _bytes(type_: str) -> float:
    total = 0.0
    for name, bits, shape in _ARRAY.findall(type_):
        elements = 1
        for dimension in filter(None, shape.split(",")):
            elements *= int(dimension)
        total += elements * (8 if name == "pred" else int(bits)) / 8
    return total
