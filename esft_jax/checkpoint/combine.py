"""Adapters of one base together: one adapter of several, and how two of them differ."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from esft_jax.adapt.expert_config import ExpertConfig
from esft_jax.checkpoint.adapter import Adapter, load_adapter, save_adapter
from esft_jax.checkpoint.folder import make_way
from esft_jax.checkpoint.identity import PARTS, check_same_base
from esft_jax.checkpoint.load import open_source
from esft_jax.checkpoint.manifest import MANIFEST
from esft_jax.checkpoint.source import Source
from esft_jax.checkpoint.tensor_files import common_dtype, is_finite
from esft_jax.errors import InputError

# `union` takes every tensor from the adapter that has it, and refuses one that several have; `mean`
# takes the weighted mean of those that have it; `arithmetic` adds weighted changes to the base's.
Method = Literal["union", "mean", "arithmetic"]


def combine_adapters(
    folders: Sequence[str | Path],
    target: str | Path,
    method: Method = "union",
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
) -> ExpertConfig:
    """Write one adapter that does what several adapters of one base do.

    Sums are of float32, and written in the smallest type that holds those of the adapters. The
    manifest has the manifests of all of them, with their weights.

    Args:
        folders: two adapters or more, of tuned tensors: none of low rank.
        target: folder to write, new or empty.
        method: what becomes of tensors that several have.
        weights: of each adapter; default: 1. For a mean, their sum over those that have a tensor
            need not be 1. None with `union`.
        base: its Hugging Face folder, hub name or converted checkpoint; needed for `arithmetic`
            (Task Arithmetic, arXiv 2212.04089), and for adapters without manifests.

    Returns:
        What the adapter replaces.

    Raises:
        InputError: adapters of several bases, or that overlap, or bad weights; nothing is written.
    """
    target = Path(target)
    make_way(target)
    adapters = [_open(folder) for folder in folders]
    if len(adapters) < 2:
        raise InputError("adapters: expected two or more to combine")
    weights = _checked_weights(method, weights, len(adapters))
    source = None if base is None else open_source(base)
    start = source if method == "arithmetic" else None
    if start is None and method == "arithmetic":
        raise InputError("--base: missing; arithmetic adds changes to its tensors")
    identity = _common_base(adapters, source)
    holders = _holders(adapters)
    if method == "union":
        _check_disjoint(adapters, holders)
    experts = _union(adapters)
    types = {
        name: common_dtype(adapters[i].tensors.dtype(name) for i in held)
        for name, held in holders.items()
    }

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, held in holders.items():
            if len(held) == 1 and start is None:
                yield name, adapters[held[0]].tensors[name]
                continue
            sides = [(weights[i], adapters[i].tensors[name]) for i in held]
            with np.errstate(over="ignore"):  # which is refused below
                total = _sum(sides, None if start is None else start.tensor(name))
                combined = total.astype(types[name])
            if not is_finite(combined):
                raise InputError(
                    f"{target}: combined, tensor {name!r} has values that are no finite numbers in "
                    f"{types[name].name}"
                )
            yield name, combined

    parts = [
        {"folder": str(adapter.folder), "weight": weight, "manifest": adapter.manifest}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    manifest = identity | {"combined": {"method": method, "adapters": parts}}
    save_adapter(target, tensors(), experts, manifest)
    return experts


@dataclass(frozen=True)
class Difference:
    """How two adapters differ.

    Attributes:
        only_first, only_second, both: experts by layer, in ascending order.
        also: the other parts that each trains.
        change: over tensors that both have, the norm of their difference, divided by that of the
            first one's tensors; None where they share none.
    """

    only_first: dict[int, list[int]]
    only_second: dict[int, list[int]]
    both: dict[int, list[int]]
    also: tuple[tuple[str, ...], tuple[str, ...]]
    change: float | None


def compare_adapters(first: str | Path, second: str | Path) -> Difference:
    """How two adapters of tuned tensors differ.

    Raises:
        InputError: they are of different bases, or one is of low rank.
    """
    one, other = adapters = [_open(folder) for folder in (first, second)]
    _check_bases(adapters)
    chosen = [
        {layer: set(ids) for layer, ids in adapter.expert_cfg.experts.items()}
        for adapter in adapters
    ]
    layers = sorted(chosen[0].keys() | chosen[1].keys())

    def by_layer(pick: Any) -> dict[int, list[int]]:
        found = {layer: sorted(pick(*(c.get(layer, set()) for c in chosen))) for layer in layers}
        return {layer: ids for layer, ids in found.items() if ids}

    distance = size = 0.0
    shared = [name for name in one.tensors if name in other.tensors]
    for name in shared:
        a, b = (adapter.tensors[name].astype(np.float64) for adapter in adapters)
        if a.shape != b.shape:
            raise InputError(
                f"{other.folder}: tensor {name!r} has shape {list(b.shape)}, and "
                f"{list(a.shape)} in {one.folder}"
            )
        distance, size = distance + float(((a - b) ** 2).sum()), size + float((a**2).sum())
    return Difference(
        by_layer(set.difference),
        by_layer(lambda a, b: b - a),
        by_layer(set.intersection),
        (one.expert_cfg.also, other.expert_cfg.also),
        (distance / size) ** 0.5 if shared and size else None,
    )


def _sum(
    sides: Sequence[tuple[float, np.ndarray]], start: np.ndarray | None
) -> Float[np.ndarray, "..."]:
    """Their weighted mean; with a tensor to start from, that one and the weighted changes of it."""
    weighted = [(np.float32(weight), side.astype(np.float32)) for weight, side in sides]
    if start is None:
        total = sum((weight * side for weight, side in weighted), np.float32(0))
        return np.asarray(total / sum(weight for weight, _ in weighted))
    start = start.astype(np.float32)
    return sum((weight * (side - start) for weight, side in weighted), start)


def _open(folder: str | Path) -> Adapter:
    adapter = load_adapter(folder)
    if not isinstance(adapter, Adapter):
        raise InputError(f"{folder}: is of low rank; expected an adapter of tuned tensors")
    return adapter


def _checked_weights(method: Method, weights: Sequence[float] | None, count: int) -> list[float]:
    if weights is None:
        return [1.0] * count
    if method == "union":
        raise InputError("--weights: union takes tensors as they are; expected mean or arithmetic")
    if len(weights) != count:
        raise InputError(f"--weights: {len(weights)} for {count} adapters; expected one for each")
    if method == "mean" and min(weights) <= 0:
        raise InputError(f"--weights: {min(weights):g}; expected positive ones for a mean")
    return list(weights)


def _common_base(adapters: Sequence[Adapter], source: Source | None) -> dict[str, Any]:
    """What the manifests say of the base, the type and the chats of all, which must be the same."""
    _check_bases(adapters)
    if source is not None:
        fingerprint = source.fingerprint
        for adapter in adapters:
            adapter.check(source.config, fingerprint)
    manifests = [adapter.manifest for adapter in adapters if adapter.manifest is not None]
    if not manifests and source is None:
        raise InputError("--base: missing; no adapter has a manifest that says what its base is")
    found: dict[str, Any] = {}
    if source is not None:
        found = {"base_fingerprint": source.fingerprint}
        found["config_fingerprint"] = source.config.fingerprint
    for key in ("base_model", *PARTS):
        said = [manifest[key] for manifest in manifests if key in manifest]
        found |= {key: said[0]} if said else {}
    for key in ("chat", "quantise"):
        values = [manifest.get(key) for manifest in manifests]
        if any(value != values[0] for value in values) and key == "chat":
            raise InputError(
                f"{adapters[-1].folder / MANIFEST}: chat: the adapters were trained on different "
                "formats of chats"
            )
        if values and values[0] is not None and values.count(values[0]) == len(values):
            found[key] = values[0]
    types = {kind.name for adapter in adapters if (kind := adapter.run_dtype) is not None}
    return found | ({"dtype": types.pop()} if len(types) == 1 else {})


def _check_bases(adapters: Sequence[Adapter]) -> None:
    first = next((a for a in adapters if a.manifest is not None), None)
    for adapter in adapters:
        if first is not None and first.manifest is not None and adapter.manifest is not None:
            where = str(adapter.folder / MANIFEST)
            check_same_base(adapter.manifest, first.manifest, where, f"beside {first.folder},")


def _holders(adapters: Sequence[Adapter]) -> Mapping[str, list[int]]:
    """Numbers of the adapters that have each tensor."""
    found: dict[str, list[int]] = {}
    for number, adapter in enumerate(adapters):
        for name in adapter.tensors:
            found.setdefault(name, []).append(number)
    for name, held in found.items():
        shapes = [adapters[i].tensors.files[adapters[i].tensors.stored[name]].shape for i in held]
        if len(set(shapes)) > 1:
            raise InputError(
                f"{adapters[held[-1]].folder}: tensor {name!r} has shape {list(shapes[-1])}, and "
                f"{list(shapes[0])} in {adapters[held[0]].folder}"
            )
    return found


def _check_disjoint(adapters: Sequence[Adapter], holders: Mapping[str, list[int]]) -> None:
    shared = [name for name, held in holders.items() if len(held) > 1]
    if shared:
        first, second = (adapters[i].folder for i in holders[shared[0]][:2])
        raise InputError(
            f"{second}: has tensor {shared[0]!r}, as {first} has ({len(shared)} in all); expected "
            "--method mean or arithmetic for adapters that overlap"
        )


def _union(adapters: Sequence[Adapter]) -> ExpertConfig:
    experts: dict[int, tuple[int, ...]] = {}
    for adapter in adapters:
        for layer, ids in adapter.expert_cfg.experts.items():
            # In the order of the first, whose scores are not comparable with those of others.
            experts[layer] = tuple(dict.fromkeys((*experts.get(layer, ()), *ids)))
    also = dict.fromkeys(part for adapter in adapters for part in adapter.expert_cfg.also)
    return ExpertConfig(experts, tuple(also))
