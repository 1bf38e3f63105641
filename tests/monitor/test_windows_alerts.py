"""Pieces become windows, windows alerts: one open alert, not a flood."""

from __future__ import annotations

import msgspec
import numpy as np

from millrace.core.clock import FakeClock
from millrace.core.facts import DriftWindow, FeatureSignal
from millrace.core.types import Alert
from millrace.formats.signature import Signature, TensorSpec
from millrace.monitor.alerts import decide_alert
from millrace.monitor.stage import false_alarm_rate
from millrace.monitor.windows import WindowBuilder
from millrace.stats.drift import build_reference
from millrace.stats.histogram import Histograms, layout_from_reference

SPEC = TensorSpec(name="x", dtype="float32", shape=[-1, 2], columns=["a", "b"])
SIGNATURE = Signature(
    task="regression", inputs=[SPEC], outputs=[TensorSpec(name="value", dtype="float32", shape=[-1, 1])], label="y"
)
ROWS = np.random.default_rng(0).normal(size=(600, 2)).astype(np.float32)
REFERENCE = build_reference({"x": ROWS}, {"value": ROWS[:, :1]}, SIGNATURE)


def piece(rows: int) -> dict[str, object]:
    histograms = Histograms(layout_from_reference(REFERENCE))
    histograms.add({"x": ROWS[:rows]}, {"value": ROWS[:rows, :1]})
    return histograms.to_dict()


def test_windows_close_when_full_or_old() -> None:
    clock = FakeClock()
    builder = WindowBuilder(REFERENCE, 100, clock, max_age_s=10.0, min_rows=30)
    assert builder.add(piece(60)) is None
    full = builder.add(piece(60))
    assert full is not None
    assert full.rows == 120
    assert builder.add(piece(40)) is None
    assert builder.tick() is None
    clock.sleep(11)
    old = builder.tick()
    assert old is not None
    assert old.rows == 40
    assert builder.add(piece(5)) is None
    clock.sleep(11)
    assert builder.tick() is None, "too few rows are not judged"


def window(score: float, is_alert: bool) -> DriftWindow:
    top = [FeatureSignal(name="a", score=score, threshold=0.1)]
    return DriftWindow(label="t", rows=100, score=score, threshold=0.1, is_alert=is_alert, top=top)


FRESH = Alert(id="1", endpoint="m", model="m", number=1, signal="drift", score=0.0, threshold=0.0)


def test_one_alert_grows_and_resolves_after_quiet_windows() -> None:
    first = decide_alert(window(0.5, True), None, FRESH, 0)
    assert first is not None
    assert (first.state, first.score, first.title) == ("open", 0.5, "m drifted: a")
    second = decide_alert(window(0.8, True), first, msgspec.structs.replace(FRESH, id="2"), 0)
    assert second is not None
    assert (second.id, second.score, second.facts["rows"]) == ("1", 0.8, 200)
    weaker = decide_alert(window(0.3, True), second, FRESH, 0)
    assert weaker is not None
    assert weaker.score == 0.8
    assert decide_alert(window(0.0, False), weaker, FRESH, 1) is None
    resolved = decide_alert(window(0.0, False), weaker, FRESH, 3)
    assert resolved is not None
    assert resolved.state == "resolved"
    assert decide_alert(window(0.0, False), None, FRESH, 9) is None


def test_an_alert_keeps_a_bounded_history() -> None:
    alert = None
    for _ in range(200):
        alert = decide_alert(window(0.5, True), alert, FRESH, 0)
    assert alert is not None
    assert len(alert.facts["windows"]) == 50


def test_windows_of_the_reference_rarely_alarm() -> None:
    assert false_alarm_rate(REFERENCE, 200, 0.02, seed=0) <= 0.05
    drawn_only = {name: value for name, value in REFERENCE.items() if name != "check"}
    assert false_alarm_rate(drawn_only, 200, 0.02, seed=0) <= 0.05
    # Half the windows, when half may: the rate is measured, it is not a constant.
    assert 0.2 <= false_alarm_rate(drawn_only, 200, 0.5, seed=0) <= 0.6
    assert false_alarm_rate({}, 200, 0.02, seed=0) == 0.0
