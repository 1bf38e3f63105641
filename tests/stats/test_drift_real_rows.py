"""The promise about false alarms holds for rows that are nothing like a normal distribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.datasets import load_digits

from millrace.formats.signature import Signature, TensorSpec
from millrace.stats import drift
from millrace.stats.calibration import Limits, limits_of
from millrace.stats.drift import DriftVerdict, build_reference, judge, measured_false_alarms
from millrace.stats.histogram import Histograms, layout_from_reference

Rows = Callable[[np.random.Generator, int], np.ndarray]
COLUMNS = 20
SAMPLES: dict[str, Rows] = {
    "lognormal": lambda g, n: g.lognormal(0.0, 1.5, (n, COLUMNS)),
    "cauchy": lambda g, n: g.standard_cauchy((n, COLUMNS)),
    "rare events": lambda g, n: (g.random((n, COLUMNS)) < 0.003) * 1.0,
    "mostly zero": lambda g, n: (g.random((n, COLUMNS)) < 0.05) * g.exponential(1.0, (n, COLUMNS)),
    "counts": lambda g, n: g.poisson(0.1, (n, COLUMNS)) * 1.0,
    "correlated": lambda g, n: g.standard_normal((n, 1)) + 0.3 * g.standard_normal((n, COLUMNS)),
}


def profile(rows: np.ndarray) -> dict[str, object]:
    columns = [f"c{index}" for index in range(rows.shape[1])]
    spec = TensorSpec(name="x", dtype="float32", shape=[-1, len(columns)], columns=columns)
    output = TensorSpec(name="value", dtype="float32", shape=[-1, 1])
    signature = Signature(task="regression", inputs=[spec], outputs=[output], label="y")
    return build_reference({"x": rows}, {"value": rows[:, :1]}, signature)


def verdict(reference: dict[str, object], rows: np.ndarray) -> DriftVerdict:
    window = Histograms(layout_from_reference(reference))
    window.add({"x": rows}, {"value": rows[:, :1]})
    return judge(reference, window, 0.02)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles without the check on their own rows: these tests draw better ones, and it takes most of the time."""
    monkeypatch.setattr(drift, "check_halves", lambda *_: {})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", SAMPLES)
def test_clean_windows_are_quiet_whatever_the_distribution(name: str) -> None:
    generator, alarms = np.random.default_rng(5), 0
    for _ in range(12):
        reference = profile(SAMPLES[name](generator, 600).astype(np.float32))
        for _ in range(10):
            alarms += verdict(reference, SAMPLES[name](generator, 200).astype(np.float32)).is_alert
    # 2 % of 120 are 2.4; a true 2 % gives more than 7 once in 250.
    assert alarms <= 7


@pytest.mark.usefixtures("unchecked")
def test_clean_digits_are_quiet_and_inverted_ones_never() -> None:
    generator, alarms, missed = np.random.default_rng(3), 0, 0
    pixels = load_digits().data.astype(np.float32)
    for _ in range(12):
        rows = generator.permutation(pixels)
        reference = profile(rows[:600])
        for start in range(600, 1600, 200):
            alarms += verdict(reference, rows[start : start + 200]).is_alert
        missed += not verdict(reference, 16 - rows[600:800]).is_alert
    assert alarms <= 4, "of 60; a normal law for the means gave 15"
    assert missed == 0


def test_the_measured_rate_is_of_real_rows_and_can_disagree() -> None:
    clean = profile(np.random.default_rng(1).standard_normal((600, 5)).astype(np.float32))
    rate = measured_false_alarms(clean, 0.02)
    assert rate is not None
    assert rate <= 0.06
    assert measured_false_alarms(clean, 0.999) == 1.0
    assert measured_false_alarms(profile(np.zeros((40, 2), np.float32)), 0.02) is None


def test_the_check_on_real_rows_exposes_thresholds_that_are_too_low(monkeypatch: pytest.MonkeyPatch) -> None:
    def too_low(counts: list[np.ndarray], is_number: list[bool], rows: int, false_alarms: float) -> Limits:
        return limits_of(counts, is_number, rows * 50, false_alarms)

    monkeypatch.setattr(drift, "limits_of", too_low)
    rate = measured_false_alarms(profile(np.random.default_rng(1).standard_normal((600, 5)).astype(np.float32)), 0.02)
    assert rate is not None
    assert rate > 0.2


def test_one_wild_value_is_no_drift_but_another_unit_is() -> None:
    generator = np.random.default_rng(2)
    reference = profile(generator.standard_normal((2000, 5)).astype(np.float32))
    window = generator.standard_normal((500, 5)).astype(np.float32)
    window[0, 0] = 1e30
    assert not verdict(reference, window).is_alert
    window[:, 1] *= 1000
    loud = verdict(reference, window)
    assert loud.is_alert
    assert loud.top[0].name == "c1"


def test_the_same_rows_give_the_same_profile() -> None:
    rows = np.random.default_rng(9).standard_normal((600, 4)).astype(np.float32)
    assert profile(rows) == profile(rows.copy())


def test_a_window_of_other_features_is_refused() -> None:
    generator = np.random.default_rng(2)
    one, two = (profile(generator.standard_normal((100, columns)).astype(np.float32)) for columns in (2, 3))
    window = Histograms(layout_from_reference(two))
    window.add({"x": np.zeros((60, 3), np.float32)}, {"value": np.zeros((60, 1), np.float32)})
    with pytest.raises(ValueError, match="other features"):
        judge(one, window)
