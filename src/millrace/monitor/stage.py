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
from millrace.stats.drift import judge
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
    """The share of windows drawn from the reference itself that alarm.

    Args:
        reference: The profile.
        rows: Rows per window.
        false_alarms: What was asked for.
        seed: Of the windows drawn here; the calibration draws others.
    """
    if not reference:
        return 0.0
    profile = Histograms.from_dict(reference["histograms"])
    generator = np.random.default_rng(seed)
    alarms = 0
    for _ in range(CHECK_WINDOWS):
        window = resampled(profile, rows, generator)
        alarms += judge(reference, window, false_alarms).is_alert
    return alarms / CHECK_WINDOWS


def resampled(profile: Histograms, rows: int, generator: np.random.Generator) -> Histograms:
    """A window of so many rows drawn from a profile: its bins, and its mean with that many rows' noise."""
    window = Histograms(profile.layout)
    window.rows = rows
    for index, counts in enumerate(profile.counts):
        window.counts[index] = generator.multinomial(rows, counts / max(counts.sum(), 1))
        mean, sd = profile.moments(index)
        seen = int(window.counts[index][:-1].sum())
        window.sums[index] = seen * (mean + generator.standard_normal() * sd / np.sqrt(max(seen, 1)))
    return window
