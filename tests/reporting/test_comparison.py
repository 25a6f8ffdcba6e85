"""What is said of the methods that a sweep compares."""

from esft_jax.reporting.comparison import verdict
from esft_jax.sweeping.table import MethodRow, Spread


def row(method: str, average: float, retention: float | None, seeds: int = 1) -> MethodRow:
    spread = Spread(average, 2.0 if seeds > 1 else 0.0, seeds)
    kept = None if retention is None else Spread(retention, 0.0, seeds)
    return MethodRow(
        method, None, {"one": spread}, spread, spread, kept, {}, 0.1, None, 1.0, None, 1.0
    )


def test_one_seed_says_nothing_of_a_spread() -> None:
    rows = [row("base", 1, 2), row("full", 50, 3), row("token", 50, 2.5)]
    assert verdict(rows) == (
        "On the tasks, full does best: 50.0 on average, where the base has 1.0. token forgets "
        "least: the loss of what was not trained on rises by 0.50 nats per token, "
        "with full by 1.00."
    )
    several = [row("base", 1, 2), row("full", 50, 3, 3), row("token", 49, 2.5, 3)]
    assert "Within a standard deviation of it: token." in verdict(several)


def test_methods_without_held_out_data() -> None:
    known = [row("base", 1, 2), row("full", 50, None), row("token", 40, 2.5)]
    text = verdict(known)
    assert text.endswith(
        "token forgets least: the loss of what was not trained on rises by 0.50 nats per token."
    )
    assert "forget" not in verdict([row("base", 1, None), row("full", 50, None)])
