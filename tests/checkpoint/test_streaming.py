import threading
import time

import pytest

from esft_jax.checkpoint import streaming
from esft_jax.checkpoint.streaming import in_order, share


def test_results_come_in_order_and_within_the_bound(monkeypatch):
    monkeypatch.setattr(streaming, "_MAX_BYTES", 10)
    sizes = [3, 4, 2, 12, 1, 5, 5, 5, 11, 2] * 3
    lock, held, most = threading.Lock(), [], 0

    def work(item):
        nonlocal most
        number, size = item
        with lock:
            held.append(size)
            most = max(most, sum(held) if len(held) > 1 else 0)
        time.sleep(0.002 * (number % 3))
        return -number

    found = []
    for (number, size), result in in_order(work, enumerate(sizes), lambda item: item[1]):
        found.append((number, result))
        held.remove(size)
    assert found == [(number, -number) for number in range(len(sizes))]
    assert 5 < most <= 10  # several at once, but never more than the bound


def test_an_error_ends_the_work():
    done = []

    def work(item):
        if item == 3:
            raise ValueError("three")
        done.append(item)

    with pytest.raises(ValueError, match="three"):
        for _ in in_order(work, range(1000), lambda _: 1 << 20):
            pass
    assert len(done) < 1000


@pytest.mark.parametrize("parts", [1, 2, 3, 7, 50])
def test_shares_cover_everything_once_and_are_even(parts):
    sizes = {f"t{i}": 1 + (i * 37) % 100 for i in range(200)}
    found = [share(list(sizes), sizes.__getitem__, part, parts) for part in range(parts)]
    assert [name for names in found for name in names] == list(sizes)
    for names in found:
        assert abs(sum(map(sizes.get, names)) - sum(sizes.values()) / parts) <= max(sizes.values())
    assert share([], len, 0, 2) == []
