"""Each section of the report: its sentence with its numbers, and its picture."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_report_page import full_facts, render


def section(title: str) -> str:
    """The HTML of one section."""
    found = {re.search(r"<h2>(.*?)</h2>", part)[1]: part for part in render(full_facts()).split("<section>")[1:]}  # type: ignore[index]
    return found[title]


@pytest.mark.parametrize(
    ("title", "wanted"),
    [
        (
            "Data",
            ["10 rows in = 8 kept + 2 rejected", "2 duplicate", 'aria-label="rows per class"', "rejected samples"],
        ),
        ("Training", ['aria-label="training curves"', "best epoch 1"]),
        ("Mistakes", ["1 of 2 held-out rows are wrong", 'aria-label="confusion matrix', "<img", "taken for b"]),
        ("Smaller", ["Serving int8-static: fastest", "limit 1 pp", 'class="whisker"', "(1.20–1.40)", "0.40 pp"]),
        ("Promotion", ["better", 'aria-label="paired wins and losses"', "only the new one is right"]),
        ("Live", ["2 of 2 real requests", 'aria-label="drift of every window"', "0.90 &gt; 0.10"]),
        ("Lineage", ['aria-label="lineage"', "dataset"]),
        ("Reproduce", ["millrace run", "<summary>spec", "<summary>environment", "<summary>digests", "sha256:aaa"]),
    ],
)
def test_a_section_says_and_shows_what_it_must(title: str, wanted: list[str]) -> None:
    html = section(title)
    assert [words for words in wanted if words not in html] == []
    assert title == "Reproduce" or "<svg" in html


def test_pixels_that_drift_are_a_heat_map() -> None:
    facts = full_facts()
    facts["monitor"]["windows"][1]["scores"] = {f"pixel {index}": index / 4 for index in range(4)}
    page = render(facts)
    assert re.search(r'<img[^>]*alt="drift of every pixel"', page)
