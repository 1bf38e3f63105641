"""Learning rates as pure functions of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math
from collections.abc import Callable

_WARM_UP = 0.3  # share of the steps in which one_cycle rises
_START = 25.0  # one_cycle starts at lr / 25
_END = 1e4  # and ends at lr / 25 / 10000
_STEP_EVERY = 1 / 3  # `step` divides by ten after each third


def _one_cycle(share: float) -> float:
    low = 1 / _START
    if share < _WARM_UP:
        return low + (1 - low) * (1 - math.cos(math.pi * share / _WARM_UP)) / 2
    falling = (share - _WARM_UP) / (1 - _WARM_UP)
    end = low / _END
    return end + (1 - end) * (1 + math.cos(math.pi * falling)) / 2


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda share: 1.0,
    "cosine": lambda share: (1 + math.cos(math.pi * share)) / 2,
    "one_cycle": _one_cycle,
    "linear": lambda share: 1.0 - share,
    "step": lambda share: 0.1 ** math.floor(share / _STEP_EVERY + 1e-9),
}


def learning_rate(schedule: str, peak: float, step: int, steps: int) -> float:
    """The learning rate of an optimiser step.

    Args:
        schedule: A key of `SCHEDULES`.
        peak: The spec's `optimizer.lr`: the largest.
        step: From 0.
        steps: How many there are in all.

    Source of one_cycle: Smith, Topin, "Super-convergence", 2018, with cosine flanks.

    Example:
        >>> [round(learning_rate("one_cycle", 1.0, step, 11), 2) for step in (0, 3, 10)]
        [0.04, 1.0, 0.0]
    """
    return peak * SCHEDULES[schedule](step / max(steps - 1, 1))
