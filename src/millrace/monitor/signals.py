"""A window of telemetry becomes a signal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from millrace.core.facts import DriftWindow, FeatureSignal
from millrace.stats.drift import judge
from millrace.stats.histogram import Histograms


def window_of(label: str, reference: Mapping[str, Any], window: Histograms, false_alarms: float) -> DriftWindow:
    """Judge a window.

    Args:
        label: What to call it: "clean", "inverted", a time.
        reference: The bundle's profile.
        window: What was served.
        false_alarms: The share of clean windows that may alarm.
    """
    verdict = judge(reference, window, false_alarms)
    top = [FeatureSignal(name=one.name, score=one.score, threshold=one.threshold) for one in verdict.top]
    return DriftWindow(
        label=label,
        rows=verdict.rows,
        score=verdict.score,
        threshold=verdict.threshold,
        is_alert=verdict.is_alert,
        top=top,
        scores={name: round(score, 4) for name, score in verdict.scores.items()},
    )
