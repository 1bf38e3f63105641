"""The state machines of runs and steps: which transition is allowed."""

from __future__ import annotations

from typing import Literal, get_args

RunState = Literal["pending", "running", "succeeded", "failed", "cancelled"]
StepState = Literal["pending", "running", "succeeded", "cached", "failed", "cancelled", "skipped"]

RUN_TRANSITIONS: dict[str, frozenset[str]] = {
    "pending": frozenset({"running", "cancelled", "failed"}),
    "running": frozenset({"running", "succeeded", "failed", "cancelled"}),
    "failed": frozenset({"running"}),
    "cancelled": frozenset({"running"}),
    "succeeded": frozenset(),
}
STEP_TRANSITIONS: dict[str, frozenset[str]] = {
    "pending": frozenset({"running", "cached", "cancelled", "skipped", "failed"}),
    "running": frozenset({"pending", "running", "succeeded", "failed", "cancelled"}),
    "failed": frozenset({"pending", "running"}),
    "cancelled": frozenset({"pending", "running"}),
    "skipped": frozenset({"pending", "running"}),
    "succeeded": frozenset(),
    "cached": frozenset(),
}
RUN_END_STATES = frozenset({"succeeded", "failed", "cancelled"})
STEP_DONE_STATES = frozenset({"succeeded", "cached"})
assert set(RUN_TRANSITIONS) == set(get_args(RunState))
assert set(STEP_TRANSITIONS) == set(get_args(StepState))


def check_transition(table: dict[str, frozenset[str]], old: str, new: str) -> None:
    """Refuse a transition that the table does not allow.

    Raises:
        ValueError: `new` may not follow `old`: a bug in the caller, never a user's mistake.

    Example:
        >>> check_transition(RUN_TRANSITIONS, "pending", "running")
        >>> check_transition(RUN_TRANSITIONS, "succeeded", "running")
        Traceback (most recent call last):
        ...
        ValueError: a state 'succeeded' cannot become 'running'
    """
    if new not in table[old]:
        raise ValueError(f"a state {old!r} cannot become {new!r}")
