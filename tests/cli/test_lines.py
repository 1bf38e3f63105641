"""Facts as lines: classification, regression, without a champion, own steps."""

from __future__ import annotations

from typing import Any

from millrace.cli import lines


def latency(speedup: float = 1.0) -> list[dict[str, Any]]:
    return [{"batch_size": 1, "p50_s": 86e-6, "speedup": speedup}]


def variants(metric: str, score: float, bound: float | None, status: str = "certified") -> dict[str, Any]:
    guarantee = {
        "status": status, "metric": metric, "base_score": score, "score": score, "bound": bound, "limit": 0.01,
        "confidence": 0.95, "changed": 1, "rows": 600,
    }  # fmt: skip
    base = {"name": "fp32", "size_bytes": 592_000, "size_ratio": 1.0, "guarantee": None, "latency": latency()}
    small = {
        "name": "int8-static", "size_bytes": 157_000, "size_ratio": 3.77, "guarantee": guarantee,
        "latency": latency(0.8),
    }  # fmt: skip
    return {"variants": [base, small], "chosen": "int8-static", "why": "fastest", "confidence": 0.95}


def test_the_table_of_a_classifier() -> None:
    header, base, small = lines.variant_rows(variants("accuracy", 0.993, 0.0028))
    assert header == ["VARIANT", "ACC", "DROP(95%)", "CHANGED", "SIZE", "b1"]
    assert base[:4] == [" fp32", "99.3", "-", "-"]
    assert small[:4] == ["*int8-static", "99.3", "<=0.28pp", "1/600"]
    assert small[-1] == "0.8x", "slower is shown as slower"
    verdict = lines.verdict_line(variants("accuracy", 0.993, 0.0028))
    assert verdict == "Serving int8-static: 3.8x smaller, loses at most 0.28 points (95 % sure; limit 1.0)."


def test_the_table_of_a_regressor_speaks_of_error() -> None:
    facts = variants("absolute_error", 41.23456, 0.004)
    header, base, small = lines.variant_rows(facts)
    assert header[1] == "ERR"
    assert base[1] == "41.23"
    assert small[2] == "<=0.40%"
    assert "0.40 % of the error" in lines.verdict_line(facts)


def test_what_is_not_certified_says_so() -> None:
    _, _, small = lines.variant_rows(variants("accuracy", 0.99, 0.03, "undecided"))
    assert small[2] == "<=3.00pp undecided"
    _, _, small = lines.variant_rows(variants("accuracy", 0.99, None, "not tested"))
    assert small[2] == "not tested"
    assert lines.verdict_line({**variants("accuracy", 0.99, 0.0), "chosen": "fp32"}) == "Serving fp32: fastest"


def test_one_line_for_each_kind_of_facts() -> None:
    data = {"rows_in": 9, "rejected": 2, "rejected_by_reason": {"duplicate": 2, "range": 0}, "split": {"train": 7}}
    assert lines.step_line("data", data) == "9 in, 2 rejected (2 duplicate); train 7"
    metrics = [{"name": "mae", "value": 41.2, "low": 39.0, "high": 43.5}]
    assert lines.step_line("evaluate", {"rows": 80, "metrics": metrics}) == "80 rows: mae 41.2 (39 to 43.5)"
    metrics = [{"name": "accuracy", "value": 0.9, "low": 0.8, "high": 0.95}]
    assert "accuracy 90.0 % (80.0 % to 95.0 %)" in lines.step_line("evaluate", {"rows": 80, "metrics": metrics})
    boosted = {"model": "boosting", "candidates": ["a", "b"], "metric": "mae", "best_score": 41.2}
    assert lines.step_line("train", boosted) == "boosting chosen of 2, mae val 41.2"
    served = {"answered": 599, "requests": 600, "wrong": 1, "p50_s": 3e-4}
    assert lines.step_line("serve", served) == "599/600 requests answered, 1 WRONG, p50 0.3 ms"
    assert lines.step_line("sweep", {"rows": 3, "nested": {}}) == "rows 3"
    assert lines.step_line("sweep", {}) == "done"


def test_a_champion_that_stays_is_named() -> None:
    gate = {"verdict": "kept", "explanation": "loses too much", "champion": "digits v1"}
    facts = {"model": "digits", "number": 2, "alias": "champion", "promoted": False, "gate": gate}
    assert lines.step_line("register", facts) == "digits v2 signed, champion stays digits v1 (kept: loses too much)"
    facts = {**facts, "promoted": True, "gate": {**gate, "explanation": "better"}}
    assert lines.step_line("register", facts) == "digits v2 signed -> champion (better)"


def test_windows_of_drift() -> None:
    quiet = {"label": "clean", "is_alert": False}
    alert = {"label": "inverted", "is_alert": True, "score": 0.94, "threshold": 0.12, "top": [{"name": "pixel 28"}]}
    said = lines.step_line("monitor", {"windows": [quiet, alert]})
    assert said == "clean: quiet | inverted: ALERT .94 > .12, pixel 28"
