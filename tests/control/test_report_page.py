"""The report: whole, partial, hostile; never a request to anywhere."""

from __future__ import annotations

import base64
import html
import math
import re
import struct
import subprocess
import zlib
from typing import Any

import msgspec
import pytest

from millrace.control import charts
from millrace.control.card import render_card
from millrace.control.pareto import pareto
from millrace.control.pictures import image
from millrace.control.report import render_report
from millrace.core import facts as f

HOSTILE = "<script>alert(1)</script>"


def full_facts() -> dict[str, dict[str, Any]]:
    guarantee = f.GuaranteeFacts(
        status="certified", metric="accuracy", base_score=0.99, score=0.99, drop=0.0, bound=0.004, limit=0.01,
        confidence=0.95, rows=600, changed=1, changed_bound=0.008, changed_limit=0.05,
    )  # fmt: skip
    latency = [f.LatencyFacts(batch_size=1, p50_s=5e-5, speedup=1.3, low=1.2, high=1.4)]
    variants = [
        f.VariantFacts(name="fp32", size_bytes=600_000, size_ratio=1.0, snr_db=None, guarantee=None, latency=latency),
        f.VariantFacts(
            name="int8-static", size_bytes=160_000, size_ratio=3.7, snr_db=30.0, guarantee=guarantee, latency=latency
        ),
    ]
    made = {
        "data": f.DataFacts(
            rows_in=10, rows_kept=8, rejected=2, rejected_by_reason={"duplicate": 2}, split={"train": 6, "test": 2},
            task="classification", label="y", classes={HOSTILE: 4, "b": 4},
            samples=[f.RejectedSample(rule="drop_duplicates", reason="duplicate", column=None, value=HOSTILE,
                                      file=HOSTILE, row=3)],
        ),
        "train": f.TrainFacts(
            framework="torch", model=HOSTILE, metric="accuracy", epochs=[f.EpochFacts(epoch=1, loss=0.5)], best_epoch=1,
            best_score=0.9,
        ),
        "evaluate": f.EvaluateFacts(
            rows=2, task="classification", confidence=0.95, classes=[HOSTILE, "b"], confusion=[[1, 1], [0, 0]],
            metrics=[f.MetricValue(name="accuracy", value=0.5, low=0.1, high=0.9)], image=[2, 2],
            mistakes=[f.Mistake(row=1, expected=HOSTILE, predicted="b", pixels=[0, 1, 2, 3])],
        ),
        "compress": f.CompressFacts(
            variants=variants, chosen="int8-static", why="fastest", rows=600, max_drop=0.01, max_changed=0.05,
            confidence=0.95, threads=1,
        ),
        "register": f.RegisterFacts(
            model=HOSTILE, number=2, alias="champion", promoted=True,
            gate=f.GateFacts(verdict="promoted", champion="m v1", rows=2, wins=1, losses=0, ties=1, explanation="better"),
        ),
        "serve": f.ServeFacts(requests=2, answered=2, wrong=0, p50_s=1e-3, p99_s=2e-3, requests_per_s=900, variant="fp32"),
        "monitor": f.MonitorFacts(
            windows=[
                f.DriftWindow(label="clean", rows=100, score=0.01, threshold=0.1, is_alert=False, scores={"pixel 0": 0.1}),
                f.DriftWindow(label=HOSTILE, rows=100, score=0.9, threshold=0.1, is_alert=True, scores={HOSTILE: 0.9}),
            ],
            false_alarms=0.02, measured_false_alarms=0.01, reference_rows=600, window_rows=200, image=[2, 2],
        ),
    }  # fmt: skip
    return {name: msgspec.to_builtins(value) for name, value in made.items()}


def render(facts: dict[str, dict[str, Any]], state: str = "succeeded", error: dict[str, Any] | None = None) -> str:
    return render_report(
        facts=facts, name=HOSTILE, state=state, error=error, spec_text=HOSTILE, overrides=[HOSTILE],
        steps={"data": ("succeeded", 1.0)}, digests={"data.dataset": "sha256:" + "a" * 64}, environment={"x": HOSTILE},
    )  # fmt: skip


def test_every_section_in_order() -> None:
    page = render(full_facts())
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["Data", "Training", "Mistakes", "Smaller", "Promotion", "Live", "Lineage", "Reproduce"]
    assert page.count('class="tile"') == 4


def test_nothing_hostile_runs_and_nothing_is_fetched() -> None:
    page = render(full_facts())
    assert "<script" not in page
    assert not re.search(r"(src|href|url\()\s*=?\s*[\"']?(https?:)?//", page)


@pytest.mark.parametrize("missing", ["data", "train", "evaluate", "compress", "register", "serve", "monitor"])
def test_a_partial_run_has_a_report(missing: str) -> None:
    facts = full_facts()
    del facts[missing]
    assert "<h2>Reproduce</h2>" in render(facts)


def test_a_failed_run_says_what_went_wrong() -> None:
    page = render({}, "failed", {"message": f"model.py:3 {HOSTILE}", "hint": "look"})
    assert "1 of 1 steps finished" in page
    assert "What went wrong" in page
    assert "model.py:3 &lt;script&gt;" in page


def test_a_loss_that_became_null_and_an_old_record_do_not_break_the_page() -> None:
    facts = full_facts()
    facts["train"]["epochs"] = [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": None}]
    facts["monitor"] = {"windows": "from another age"}
    page = render(facts)
    assert "<h2>Training</h2>" in page
    assert "loss 0.5" in page
    assert "Its facts cannot be shown" in page, "what is left out is said"
    assert "Expected `array`" in page


@pytest.mark.parametrize("values", [[None], [math.nan, math.inf], [1.0], [1.0, None, 3.0]])
def test_curves_with_gaps(values: list[float | None]) -> None:
    assert charts.lines([("loss", values)], "curves", mark=1).startswith("<svg")


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
def test_labels_stay_inside_and_whole(width: int) -> None:
    chart = charts.wins({"wins": 4, "losses": 2}, width)
    assert f'viewBox="0 0 {width} ' in chart
    assert "only the champion is right" in chart
    for x in re.findall(r'<text x="([\d.]+)"', chart):
        assert 0 <= float(x) <= width


@pytest.mark.parametrize("width", [charts.WIDE, charts.NARROW])
def test_names_of_equal_variants_do_not_lie_on_one_another(width: int) -> None:
    latency = [{"batch_size": 1, "p50_s": 1e-4, "speedup": 1.0, "low": 0.9, "high": 1.1}]
    variants = [{"name": f"variant-{index}", "guarantee": None, "latency": latency} for index in range(5)]
    chart = pareto(variants, "variant-0", 0.01, "pp", width)
    places = [float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)"[^>]*>variant-', chart)]
    sides = re.findall(r'text-anchor="(\w+)">variant-', chart)
    assert len(set(zip(places, sides, strict=True))) == 5


def test_images_are_small_whatever_their_size() -> None:
    photo = image([0.5] * (600 * 800 * 3), [600, 800, 3], "a photo")
    assert len(photo) < 20_000
    assert image([0, 1, 2, 3], [2, 2], 'a "quoted" <one>').count("<") == 1
    assert image([], [2, 2], "nothing").startswith("<img")
    assert image([math.nan] * 4, [2, 2], "nothing").startswith("<img")


def test_colour_images_keep_their_colours() -> None:
    data = image([1.0, 0.0, 0.0, 0.0, 0.0, 1.0], [1, 2, 3], "red, blue").split("base64,")[1].split('"')[0]
    png = base64.b64decode(data)
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    at = png.index(b"IDAT")
    (size,) = struct.unpack(">I", png[at - 4 : at])
    assert zlib.decompress(png[at + 4 : at + 4 + size]) == b"\0" + bytes([255, 0, 0, 0, 0, 255])


def test_the_card_has_numbers_limits_and_no_markup_from_outside() -> None:
    facts = full_facts()
    facts["evaluate"]["slices"] = [
        {"column": "a|b", "value": HOSTILE, "rows": 7, "score": 0.25, "low": 0.1, "high": 0.5},
        {"column": "a|b", "value": "fine", "rows": 7, "score": 0.75, "low": 0.5, "high": 0.9},
    ]
    facts["compress"]["variants"][1]["needs_vnni"] = True
    card = render_card(facts, "project")
    assert "<script" not in card
    assert "| accuracy | 0.5 | 0.1 to 0.9 |" in card
    assert "Lowest slice: a\\|b = &lt;script>alert(1)&lt;/script>, 0.25 on 7 rows" in card
    assert "Only on processors with VNNI: int8-static" in card
    assert "## Limits" in render_card({}, "project")


def test_the_command_can_be_pasted_whatever_an_override_holds() -> None:
    page = html.unescape(render(full_facts()))
    command = page[page.index("millrace run \\\n") :].split("\nmillrace serve")[0]
    # A real shell: Python's shlex knows no line continuation.
    script = f"millrace() {{ printf '%s\\n' \"$@\"; }}\n{command}\n"
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines() == ["run", "--set", HOSTILE]
    assert shown.stderr == ""
