"""What a compiled step moves between devices, read from the text of its program (HLO)."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache

import numpy as np

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
# The type is lazy: layouts hold parentheses, but no lower-case word before one.
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLEES = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|\b(?:branch|called)_computations=\{([^}]*)\}"
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")
_KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_IOTA = re.compile(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_MEGASCALE = r'_xla_megascale_transfer_type="(\w+)"'
_AXIS = re.compile(r"'(\w+)'(?::\((\d+)\)(\d+))?")

BETWEEN = " between slices"


@dataclass(frozen=True)
class _Instruction:
    """`type operation(rest`: operands and attributes are the rest."""

    type: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition(")")[0])

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.rest)
        return found and found[1]


@dataclass
class _Computation:
    instructions: dict[str, _Instruction] = field(default_factory=dict)
    root: str = ""


def received_bytes(text: str, devices: int, slices: int = 1) -> dict[str, float]:
    """Bytes that one device receives in a step, by kind of collective; of those that connect slices
    the name ends with `BETWEEN`.

    Each counts as often as its loop runs, where that is known, else once: the loop over pieces of
    assignments, which is not, runs once for a balanced router. A ring is assumed: to gather or
    scatter N bytes over n devices, each receives N (n - 1) / n; to reduce them everywhere, twice
    that.

    Args:
        text: `jax.stages.Compiled.as_text()`.
        devices: of the whole program; a collective that names no groups is over all of them.
        slices: that the devices form, in their order.
    """
    computations, entry = _read(text)
    chains = set[str]()

    def of_instruction(instruction: _Instruction, computation: str) -> dict[str, float]:
        operation, kind = instruction.operation, instruction.operation.removesuffix("-start")
        if kind in _KINDS:
            # TPU: fusions that overlap one with computation repeat it, as links of a chain.
            if chain := instruction.attribute(r"channel_id=(\d+),.*\bchain_id="):
                if chain in chains:
                    return {}
                chains.add(chain)
            spans = _spans_slices(instruction.rest, devices, slices)
            suffix = BETWEEN if spans else ""
            if computation.startswith("all-reduce-scatter"):  # TPU: each keeps its part only
                received = _received("all-reduce", instruction, devices) / 2
                return {f"reduce-scatter{suffix}": received}
            return {kind + suffix: _received(kind, instruction, devices)}
        if operation == "recv" and (transfer := instruction.attribute(_MEGASCALE)):
            # TPU slices exchange through their hosts.
            kind = transfer.lower().replace("_", "-")
            return {kind + BETWEEN: _by_ring(kind, _bytes(instruction.type), slices)}
        if operation == "while":
            body = instruction.attribute(r"\bbody=%?([\w.\-]+)") or ""
            times = _trips(instruction, computations)
            return {kind: times * size for kind, size in total(body).items()}
        if operation.endswith(("-done", "-update")):  # these name what `-start` has called
            return {}
        return _sum(
            total(name)
            for callee, branches in _CALLEES.findall(instruction.rest)
            for name in ([callee] if callee else re.findall(r"[\w.\-]+", branches))
        )

    @cache
    def total(name: str) -> dict[str, float]:
        instructions = computations[name].instructions.values()
        return _sum(of_instruction(instruction, name) for instruction in instructions)

    return total(entry)


def within_slices(received: dict[str, float]) -> dict[str, float]:
    """What of `received_bytes` stays within slices."""
    return {kind: size for kind, size in received.items() if not kind.endswith(BETWEEN)}


def _read(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[2]
            computations[name] = _Computation()
            entry = name if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, own, *parts = found.groups()
            computations[name].instructions[own] = _Instruction(*parts)
            if root:
                computations[name].root = own
    return computations, entry


def _trips(loop: _Instruction, computations: dict[str, _Computation]) -> int:
    """How often a loop runs; 1 if that is decided at run time.

    The compiler says so, or the loop counts from 0 to a constant, as those of `jax.lax.scan` do.
    """
    if known := loop.attribute(r'"known_trip_count":\{"n":"(\d+)"'):
        return int(known)
    condition, body = (
        computations[loop.attribute(rf"\b{part}=%?([\w.\-]+)") or ""]
        for part in ("condition", "body")
    )
    compare = condition.instructions[condition.root]
    if "direction=LT" not in compare.rest:
        return 1
    counter, limit = (condition.instructions[name] for name in compare.operands)
    index, end = counter.attribute(r"index=(\d+)"), _constant(limit)
    if index is None or end is None:
        return 1
    # Loops that the compiler makes of matrix products take two steps at once.
    step = None
    results = body.instructions[body.root].operands
    following = body.instructions.get(results[int(index)] if results else "")
    if following is not None and following.operation == "add":
        steps = map(_constant, (body.instructions[name] for name in following.operands))
        step = next((size for size in steps if size), None)
    return math.ceil(end / (step or 1))


def _constant(instruction: _Instruction) -> int | None:
    found = re.match(r"(\d+)\)", instruction.rest)
    return int(found[1]) if found and instruction.operation == "constant" else None


def _received(kind: str, instruction: _Instruction, devices: int) -> float:
    size, group = _bytes(instruction.type), len(_group(instruction.rest, devices))
    if instruction.operation.endswith("-start"):
        # The type has the operands beside the result; a ragged exchange has a buffer for it, too.
        share = {
            "all-gather": group / (group + 1),
            "reduce-scatter": 1 / (group + 1),
            "collective-permute": 1 / 2,
            "ragged-all-to-all": 1 / 3,
        }
        size *= share.get(kind, 1.0)
    return _by_ring(kind, size, group)


def _by_ring(kind: str, size: float, group: int) -> float:
    """Bytes that each of `group` devices in a ring receives, for a result of `size` bytes."""
    match kind:
        case "all-reduce":
            return 2 * size * (group - 1) / group
        case "reduce-scatter":
            return size * (group - 1)
        case "collective-permute":
            return size
    return size * (group - 1) / group


def _group(attributes: str, devices: int) -> list[int]:
    """The first group of devices that exchange something, by their places in the mesh."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return [int(place) for place in listed[1].split(",")]
    if iota := _IOTA.search(attributes):
        return _places(iota[2], iota[3])[: int(iota[1])].tolist()
    if named := _MESH.search(attributes):
        # A group may lie along a part of an axis: 'data':(2)4 are 4 neighbours, in each of 2
        # parts of it.
        parts = {name: rest for name, *rest in _AXIS.findall(named[4])}
        shape, chosen = [], []
        for name, size in re.findall(r"'(\w+)'=(\d+)", named[1]):
            before, part = (int(text or 0) for text in parts.get(name, ("", "")))
            before, part = before or 1, part or int(size)
            shape += [before, part, int(size) // (before * part)]
            chosen += [0, slice(None) if name in parts else 0, 0]
        places = _places(named[2], named[3]) if named[2] else np.arange(math.prod(shape))
        return places.reshape(shape)[tuple(chosen)].reshape(-1).tolist()
    return list(range(devices))


def _places(shape: str, order: str | None) -> np.ndarray:
    """The numbers from 0 on in a grid, axes in another order: of `[2,4]T(1,0)` 0, 4, 1, 5, ..."""
    sizes = [int(size) for size in shape.split(",")]
    axes = [int(axis) for axis in order.split(",")] if order else None
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(axes).reshape(-1)


def _spans_slices(attributes: str, devices: int, slices: int) -> bool:
    """Whether something is exchanged between slices, which lie one after the other in the mesh."""
    groups = [_group(attributes, devices)]
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        groups = [[int(a), int(b)] for a, b in re.findall(r"(\d+),(\d+)", pairs[1])]
    per_slice = devices // slices
    return any(len({place // per_slice for place in group}) > 1 for group in groups)


def _bytes(type_: str) -> float:
    total = 0.0
    for name, bits, shape in _ARRAY.findall(type_.replace("u32[]", "")):  # these synchronise
        elements = math.prod(int(size) for size in shape.split(",") if size)
        total += elements * (8 if name == "pred" else int(bits)) / 8
    return total


def _sum(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for part in parts:
        for kind, size in part.items():
            found[kind] = found.get(kind, 0) + size
    return found
