"""What a sweep has found about its methods, for the page."""

from collections.abc import Sequence
from pathlib import Path

from esft_jax.errors import InputError
from esft_jax.sweeping.config import BASE, load_sweep
from esft_jax.sweeping.record import open_record
from esft_jax.sweeping.table import MethodRow, summarise


def read_comparison(path: str | Path) -> list[MethodRow]:
    """The rows of a sweep so far, the base first.

    Args:
        path: configuration of the sweep.

    Raises:
        InputError: the configuration is wrong, the results are of another one, or no method has
            been run on all tasks.
    """
    sweep = load_sweep(path)
    record = open_record(sweep)
    rows = summarise(sweep, record)
    if [row.method for row in rows[:1]] != [BASE] or len(rows) == 1:
        raise InputError(
            f"{record.path}: expected the base and a method, finished on all tasks; run `sweep` "
            "first"
        )
    return rows


def forgotten(rows: Sequence[MethodRow]) -> dict[str, float]:
    """Nats by which the held-out loss of what was not trained on rose, by method."""
    if not rows or rows[0].retention is None:
        return {}
    base = rows[0].retention.mean
    return {row.method: row.retention.mean - base for row in rows[1:] if row.retention is not None}


def verdict(rows: Sequence[MethodRow]) -> str:
    """The comparison in two or three plain sentences."""
    best = max(rows[1:], key=lambda row: row.average.mean)
    spread = f" ± {best.average.deviation:.1f}" if best.average.count > 1 else ""
    text = (
        f"On the tasks, {best.method} does best: {best.average.mean:.1f}{spread} on average, where"
        f" the base has {rows[0].average.mean:.1f}."
    )
    near = [
        row
        for row in rows[1:]
        if row is not best and best.average.mean - row.average.mean <= best.average.deviation
    ]
    if near and best.average.count > 1:
        names = " and ".join(row.method for row in near)
        text += f" Within a standard deviation of it: {names}."
    lost = forgotten(rows)
    if lost:
        least = min(lost, key=lambda method: lost[method])
        text += (
            f" {least} forgets least: the loss of what was not trained on rises by"
            f" {lost[least]:.2f} nats per token"
        )
        if least != best.method and best.method in lost:
            text += f", with {best.method} by {lost[best.method]:.2f}"
        text += "."
    return text
