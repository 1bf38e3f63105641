"""The stage `monitor`: quiet on the probe's clean window, loud on its damaged one."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from millrace.core.errors import CorruptError
from millrace.core.facts import DriftWindow, MonitorFacts
from millrace.core.ports import Context
from millrace.core.spec import Spec
from millrace.formats.bundle import open_bundle
from millrace.monitor.signals import window_of
from millrace.stats.calibration import draw_windows, profile_of
from millrace.stats.drift import judge, measured_false_alarms
from millrace.stats.histogram import Histograms

CHECK_WINDOWS = 200


def monitor(spec: Spec, ctx: Context) -> dict[str, Any]:
    """Judge the windows that the probe has served against the bundle's reference.

    Returns:
        `MonitorFacts` as plain data.

    Raises:
        CorruptError: The telemetry cannot be read.
    """
    bundle = open_bundle(ctx.input("register.bundle"), signature=None, verifier=None, expected_digest=None)
    reference, false_alarms = bundle.reference, float(spec.monitor.false_alarms)
    path = ctx.input("serve.telemetry") / "telemetry.json"
    try:
        telemetry = msgspec.json.decode(path.read_bytes())
        windows: list[DriftWindow] = [
            window_of(str(window["label"]), reference, Histograms.from_dict(window["histograms"]), false_alarms)
            for window in telemetry["windows"]
        ]
    except (msgspec.DecodeError, KeyError, ValueError) as error:
        raise CorruptError(f"the probe's telemetry cannot be read: {error}") from error
    image = next((spec.image for spec in bundle.signature.inputs if spec.image), None)
    facts = MonitorFacts(
        windows=windows,
        false_alarms=false_alarms,
        measured_false_alarms=false_alarm_rate(reference, spec.monitor.window_rows, false_alarms),
        reference_rows=int(reference.get("rows", 0)),
        window_rows=spec.monitor.window_rows,
        image=image,
    )
    return msgspec.to_builtins(facts)


def false_alarm_rate(reference: dict[str, Any], rows: int, false_alarms: float, seed: int = 1) -> float:
    """The share of clean windows that alarm: of real held-out rows where the profile knows it, else of drawn ones.

    Args:
        reference: The profile.
        rows: Rows per window that is drawn.
        false_alarms: What was asked for.
        seed: Of the windows drawn here; the calibration draws others.
    """
    if not reference:
        return 0.0
    measured = measured_false_alarms(reference, false_alarms)
    if measured is not None:
        return measured
    profile = Histograms.from_dict(reference["histograms"])
    weights = profile_of(profile.counts, [feature.kind == "number" for feature in profile.layout.features]).weights
    generator = np.random.default_rng(seed)
    drawn = [draw_windows(own, rows, CHECK_WINDOWS, generator).astype(np.int64) for own in weights]
    alarms = 0
    for number in range(CHECK_WINDOWS):
        window = Histograms(profile.layout)
        window.rows = rows
        window.counts = [table[number, : len(own)] for table, own in zip(drawn, profile.counts, strict=True)]
        alarms += judge(reference, window, false_alarms).is_alert
    return alarms / CHECK_WINDOWS
