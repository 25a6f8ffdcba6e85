"""Many tensors one after the other: several at work at once, within a bound of memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_BYTES = 256 << 20


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], size: Callable[[Item], int]
) -> Iterator[tuple[Item, Result]]:
    """Items with the results of threads that work on them, in the order of the items.

    Items in the works, and results that wait for their turn, are of 256 MiB together at most; a
    larger item is worked on alone.

    Args:
        size: of an item and its result, in bytes.
    """
    waiting: deque[tuple[Item, int, Future[Result]]] = deque()
    used = 0
    with ThreadPoolExecutor() as pool:
        try:
            for item in items:
                needed = size(item)
                while waiting and used + needed > _MAX_BYTES:
                    first, freed, result = waiting.popleft()
                    yield first, result.result()
                    del result
                    used -= freed
                waiting.append((item, needed, pool.submit(work, item)))
                used += needed
            while waiting:
                first, _, result = waiting.popleft()
                yield first, result.result()
                del result
        finally:
            pool.shutdown(cancel_futures=True)


def share(items: Sequence[Item], size: Callable[[Item], int], part: int, parts: int) -> list[Item]:
    """One of the parts that items are cut into: consecutive ones, of about as many bytes each."""
    sizes = [size(item) for item in items]
    total = sum(sizes)
    return [
        item
        for item, own, end in zip(items, sizes, accumulate(sizes), strict=True)
        # By the middle of the item, so that it belongs to exactly one part.
        if (2 * end - own) * parts // (2 * total) == part
    ]
