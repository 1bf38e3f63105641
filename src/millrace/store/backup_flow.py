"""Several at once, in order, and never more in memory than a few."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def in_order(count: int, items: Iterable[T], work: Callable[[T], R]) -> Iterator[R]:
    """What `work` makes of each item, in the order of the items.

    Args:
        count: How many threads work.
        items: Taken from the caller's thread, no more than twice `count` ahead.
        work: Called in the threads; the first error ends everything.

    Example:
        >>> list(in_order(2, range(5), lambda number: number * number))
        [0, 1, 4, 9, 16]
    """
    with ThreadPoolExecutor(count, thread_name_prefix="backup") as pool:
        ahead: deque[Future[R]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) >= 2 * count:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for one in ahead:
                one.cancel()
