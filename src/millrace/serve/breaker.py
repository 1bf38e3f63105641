"""A circuit breaker: a model that only fails is not asked until it proves that it works again."""

from __future__ import annotations

import math

THRESHOLD = 5
OPEN_S = 1.0
OPEN_MAX_S = 30.0


class Breaker:
    """Opens after failures in a row; who owns it tries the model by itself and tells whether that went well.

    While it is open nothing is let in. Whose input made the model fail is not known, so no client's request
    is the proof: with one it could be held open by sending that input again.

    Args:
        threshold: Failures in a row that open it.
        open_s: Until the second trial (the first is at once); doubled after each that fails, to `OPEN_MAX_S`.

    Example:
        >>> breaker = Breaker(threshold=2)
        >>> breaker.failed(), breaker.failed(), breaker.is_open
        (False, True, True)
        >>> breaker.tried(False, now_s=100.0), breaker.retry_after_s(100.5)
        (1.0, 1)
        >>> breaker.tried(True, now_s=101.0), breaker.is_open
        (0.0, False)
    """

    def __init__(self, threshold: int = THRESHOLD, open_s: float = OPEN_S) -> None:
        self._threshold = threshold
        self._open_s = open_s
        self._wait_s = open_s
        self._next_try_s = 0.0
        self.failures = 0  # in a row
        self.opened = 0  # how often
        self.is_open = False

    def succeeded(self) -> None:
        """A call was answered."""
        self.failures = 0

    def failed(self) -> bool:
        """A call failed, and not for its client's fault; whether that has opened the breaker: try the model."""
        self.failures += 1
        if self.is_open or self.failures < self._threshold:
            return False
        self.is_open = True
        self.opened += 1
        self._wait_s = self._open_s
        return True

    def tried(self, is_well: bool, now_s: float) -> float:
        """What a trial has shown; in how many seconds the next is due, 0: none, the breaker is closed.

        Args:
            is_well: Whether the model answered.
            now_s: On any clock, the same for `retry_after_s`.
        """
        if is_well:
            self.is_open, self.failures = False, 0
            return 0.0
        wait_s = self._wait_s
        self._wait_s = min(OPEN_MAX_S, 2 * wait_s)
        self._next_try_s = now_s + wait_s
        return wait_s

    def retry_after_s(self, now_s: float) -> int:
        """For whoever is refused."""
        return max(1, math.ceil(self._next_try_s - now_s))
