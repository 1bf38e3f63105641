"""Signals become alerts: one open alert per endpoint and signal, not a flood."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from millrace.core.facts import DriftWindow
from millrace.core.types import Alert

DRIFT = "drift"
QUIET_WINDOWS = 3  # so many quiet windows in a row resolve an open alert
KEPT_WINDOWS = 50


def decide_alert(window: DriftWindow, open_alert: Alert | None, fresh: Alert, quiet: int) -> Alert | None:
    """What a judged window changes.

    Args:
        window: The window.
        open_alert: The endpoint's open drift alert, if any.
        fresh: A new alert with endpoint, model, number and id filled in.
        quiet: How many windows in a row were quiet, this one included.

    Returns:
        The alert to write, or None when nothing changes.
    """
    if window.is_alert:
        base = open_alert or fresh
        seen = [*base.facts.get("windows", []), _short(window)][-KEPT_WINDOWS:]
        is_worse = open_alert is None or window.score >= open_alert.score
        top = [msgspec.to_builtins(signal) for signal in window.top] if is_worse else base.facts.get("top", [])
        return msgspec.structs.replace(
            base,
            signal=DRIFT,
            state="open",
            score=max(window.score, base.score) if open_alert else window.score,
            threshold=window.threshold if is_worse else base.threshold,
            title=title_of(base.endpoint, [signal.name for signal in window.top]) if is_worse else base.title,
            facts={**base.facts, "windows": seen, "top": top, "rows": base.facts.get("rows", 0) + window.rows},
        )
    if open_alert is not None and quiet >= QUIET_WINDOWS:
        return msgspec.structs.replace(open_alert, state="resolved")
    return None


def title_of(endpoint: str, features: Sequence[str]) -> str:
    """One line for people.

    Example:
        >>> title_of("digits", ["pixel 28", "pixel 35", "pixel 20", "pixel 3"])
        'digits drifted: pixel 28, pixel 35, pixel 20'
    """
    return f"{endpoint} drifted: {', '.join(features[:3])}"


def _short(window: DriftWindow) -> dict[str, float | int | str]:
    return {"label": window.label, "rows": window.rows, "score": window.score, "threshold": window.threshold}
