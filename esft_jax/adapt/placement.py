"""Which device computes which expert.

The experts of a layer are split over the devices of an expert group, and the slowest device sets
the pace. Tuned experts cost memory (masters, moments), all of them cost time by the tokens they
get. So tuned ones are dealt out evenly, and where the expected load is known, from the scores,
frozen ones are then placed so that all devices get about as many tokens.

Letters: L MoE layers, E experts of a layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Placement:
    """Where the experts of every MoE layer are.

    Attributes:
        owners: for every layer, the device of each selected expert, in their order.
        positions: for every layer, where each expert lies in the layer's stack of base experts,
            which is split over the devices in contiguous, equal ranges. Selected experts have a
            place there, too, that is never read.
    """

    owners: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[int, ...], ...]


def place_experts(
    selected: Sequence[Sequence[int]],
    num_experts: int,
    shards: int,
    loads: Float[np.ndarray, "L E"] | None = None,
) -> Placement:
    """Place the experts of all layers.

    Every layer's tuned experts are dealt out evenly, and devices with the fewest rows so far take
    what does not divide: over the whole model, devices own as many, give or take one.

    Args:
        selected: for every MoE layer, the selected expert ids in ascending order.
        shards: devices that the experts are split over; they divide the number of experts.
        loads: share of the layer's tokens that each expert is expected to get. Without it, and
            below the lowest layer with a selected expert, which looks nothing up, base experts
            stay where they are; and tuned ones there, too, while there is room.
    """
    owners, positions, local = [], [], num_experts // shards
    for layer, (ids, room) in enumerate(zip(selected, _rooms(selected, shards), strict=True)):
        if loads is None or not any(selected[: layer + 1]):
            owners.append(_near_home(ids, room, local))
            positions.append(tuple(range(num_experts)))
        else:
            device = _by_load(loads[layer], ids, room, [local] * shards)
            owners.append(tuple(int(device[expert]) for expert in ids))
            positions.append(_positions(device, ids, shards))
    return Placement(tuple(owners), tuple(positions))


def place_updated_experts(
    selected: Sequence[Sequence[int]],
    num_experts: int,
    shards: int,
    loads: Float[np.ndarray, "L E"] | None = None,
) -> Placement:
    """Place experts whose base is read and updated: both lie on one device.

    Selected ones are dealt out evenly, as by `place_experts`. Experts of a device lie there in
    ascending order: on one device, all stay where they are.

    Args:
        loads: see `place_experts`; without it, experts stay on their devices while there is room.
    """
    owners: list[tuple[int, ...]] = []
    positions, local = [], num_experts // shards
    for layer, (ids, room) in enumerate(zip(selected, _rooms(selected, shards), strict=True)):
        if not any(selected[: layer + 1]):
            owners.append(())
            positions.append(tuple(range(num_experts)))
            continue
        rest = [local - places for places in room]
        if loads is None:
            others = np.setdiff1d(np.arange(num_experts), ids).tolist()
            device = np.zeros(num_experts, np.int64)
            device[list(ids)] = _near_home(ids, room, local)
            device[others] = _near_home(others, rest, local)
        else:
            device = _by_load(loads[layer], ids, room, rest)
        owners.append(tuple(int(device[expert]) for expert in ids))
        order = np.argsort(device, kind="stable")
        positions.append(tuple(int(place) for place in np.argsort(order)))
    return Placement(tuple(owners), tuple(positions))


def _rooms(selected: Sequence[Sequence[int]], shards: int) -> Iterator[list[int]]:
    """Selected experts of each device, layer after layer."""
    totals = [0] * shards
    for ids in selected:
        each, left = divmod(len(ids), shards)
        fewest = sorted(range(shards), key=totals.__getitem__)
        room = [each + (fewest.index(shard) < left) for shard in range(shards)]
        totals = [total + more for total, more in zip(totals, room, strict=True)]
        yield room


def expected_loads(
    placement: Placement,
    selected: Sequence[Sequence[int]],
    shards: int,
    loads: Float[np.ndarray, "L E"],
) -> Float[np.ndarray, "L shards"]:
    """Tokens that each device is expected to compute, over the layer's mean."""
    by_device = np.zeros((len(loads), shards))
    local = loads.shape[1] // shards
    for layer, load in enumerate(loads):
        device = np.array(placement.positions[layer]) // local
        device[list(selected[layer])] = placement.owners[layer]
        by_device[layer] = np.bincount(device, weights=load, minlength=shards)
    return by_device * shards / by_device.sum(axis=1, keepdims=True)


def _near_home(ids: Sequence[int], room: Sequence[int], local: int) -> tuple[int, ...]:
    """Tuned experts on the device of their base copy while it has room."""
    room, placed = list(room), {}
    for expert in ids:
        if room[expert // local]:
            placed[expert] = expert // local
            room[expert // local] -= 1
    free = (shard for shard, count in enumerate(room) for _ in range(count))
    return tuple(placed[e] if e in placed else next(free) for e in ids)


def _by_load(
    load: Float[np.ndarray, " E"], ids: Sequence[int], room: Sequence[int], places: Sequence[int]
) -> Int[np.ndarray, " E"]:
    """Device of each expert: the busiest expert first, to the least busy device with room.

    Args:
        room: tuned experts of each device.
        places: for other experts on each device, at most.
    """
    shards = len(room)
    tuned = np.isin(np.arange(load.size), ids)
    rooms = {True: list(room), False: list(places)}
    device, totals = np.zeros(load.size, np.int64), [0.0] * shards
    for expert in np.argsort(-load, kind="stable"):
        free = rooms[bool(tuned[expert])]
        shard = min((s for s in range(shards) if free[s]), key=totals.__getitem__)
        free[shard] -= 1
        device[expert] = shard
        totals[shard] += load[expert]
    return device


def _positions(device: Int[np.ndarray, " E"], ids: Sequence[int], shards: int) -> tuple[int, ...]:
    """Places in the stack: base experts on their devices, those of tuned ones where it is free."""
    local = device.size // shards
    held: list[list[int]] = [[] for _ in range(shards)]
    for expert in np.setdiff1d(np.arange(device.size), ids):
        held[device[expert]].append(int(expert))
    unread = iter(ids)
    for experts in held:
        experts.extend(next(unread) for _ in range(local - len(experts)))
    order = [expert for experts in held for expert in experts]
    return tuple(int(place) for place in np.argsort(order))
