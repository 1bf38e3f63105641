"""Small pictures as inline SVG: no scripts, no requests, colours from the page's style.

Every chart is drawn for a width in pixels: a page holds one for wide and one for narrow screens, both readable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDE, NARROW = 700, 320
CHAR = 6.9  # pixels that a character takes at 13 px


def svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}" '
        f'style="max-width:{width:g}px">{"".join(body)}</svg>'
    )


def text_at(x: float, y: float, text: str, *, kind: str = "t", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def number(value: float | None) -> str:
    """A number for people: four significant digits, thousands separated, never an exponent for large ones.

    Example:
        >>> number(31200.5), number(0.03564), number(7), number(None)
        ('31,200', '0.03564', '7', 'not a number')
    """
    if value is None or not math.isfinite(value):
        return "not a number"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _fit(text: str, pixels: float) -> str:
    most = max(int(pixels / CHAR), 2)
    return text if len(text) <= most else text[: most - 1] + "…"


def bars(counts: Sequence[tuple[str, float]], label: str, width: int = WIDE) -> str:
    """Horizontal bars with their names and numbers.

    Example:
        >>> bars([("a", 3), ("b", 1)], "classes").count("<rect")
        2
    """
    largest = max((value for _, value in counts), default=1) or 1
    names = min(width * 0.62, 1.12 * CHAR * max((len(name) for name, _ in counts), default=1) + 12)
    room = width - names - 62
    body = []
    for index, (name, value) in enumerate(counts):
        y, long = index * 24, max(room * max(value, 0) / largest, 1)
        body.append(text_at(names - 8, y + 16, _fit(name, names - 8), anchor="end"))
        body.append(f'<rect x="{names:.1f}" y="{y + 4}" width="{long:.1f}" height="16" rx="3" class="bar"/>')
        body.append(text_at(names + long + 8, y + 16, number(value), kind="n"))
    return svg(width, max(24 * len(counts), 24), body, label)


def flow(total: int, kept: int, rejected: Sequence[tuple[str, int]], width: int = WIDE) -> str:
    """Rows in = kept + rejected, as one divided bar."""
    body, x = [], 0.0
    parts = [("kept", kept, "bar"), *((reason, count, "bad") for reason, count in rejected if count)]
    for index, (_, count, kind) in enumerate(parts):
        long = width * count / max(total, 1)
        body.append(f'<rect x="{x:.1f}" y="0" width="{max(long - 1, 1):.1f}" height="28" rx="3" class="{kind}"/>')
        if index == 0 and long > 90:
            body.append(text_at(12, 19, f"{count:,} kept", kind="on"))
        x += long
    legend = ", ".join(f"{count:,} {name}" for name, count, _ in parts[1:]) or "none"
    body.append(text_at(width, 46, _fit(f"rejected: {legend}", width * 1.15), kind="n", anchor="end"))
    return svg(width, 52, body, f"{total} rows in, {kept} kept")


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move labels apart so that none lies on another, in the same order."""
    placed = [0.0] * len(wanted)
    last = -math.inf
    for index in sorted(range(len(wanted)), key=lambda one: wanted[one]):
        last = max(wanted[index], last + gap)
        placed[index] = last
    return placed


def lines(
    series: Sequence[tuple[str, Sequence[float | None]]], label: str, mark: int | None = None, width: int = WIDE
) -> str:
    """Curves over epochs, each scaled to the height; the best epoch is marked.

    Args:
        series: Name and values, one per epoch; what is not a number leaves a gap.
        label: What the picture shows.
        mark: The epoch to mark, counted from 1.
        width: Pixels.
    """
    height, left, right, top = 190, 8, 172, 12
    body, ends = [], []
    for index, (name, values) in enumerate(series):
        known = [(at, value) for at, value in enumerate(values) if value is not None and math.isfinite(value)]
        if not known:
            continue
        low, high = min(value for _, value in known), max(value for _, value in known)
        step = (width - left - right) / max(len(values) - 1, 1)
        points = [
            (left + step * at, top + (height - 2 * top - 24) * (1 - (value - low) / ((high - low) or 1.0)))
            for at, value in known
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline points="{path}" class="line s{index % 3}"/>')
        body.append(f'<circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="3" class="k{index % 3}"/>')
        ends.append((*points[-1], f"{name} {number(known[-1][1])}", f"k{index % 3}"))
    for (x, _, text, kind), y in zip(ends, _spread([y for _, y, _, _ in ends], 16), strict=True):
        body.append(text_at(x + 9, y + 4, _fit(text, right), kind=kind))
    if mark is not None and series and 1 <= mark <= len(series[0][1]):
        x = left + (width - left - right) / max(len(series[0][1]) - 1, 1) * (mark - 1)
        body.append(f'<line x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{height - 22}" class="mark"/>')
        anchor = "end" if x > (width - right) / 2 else "start"
        body.append(text_at(x, height - 4, f"best epoch {mark}", kind="n", anchor=anchor))
    return svg(width, height, body, label)


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str], width: int = WIDE) -> str:
    """A confusion matrix: expected down, predicted across; mistakes are coloured."""
    left = min(width * 0.3, CHAR * max((len(name) for name in names), default=1) + 16)
    size = max(8.0, min(44.0, (width - left - 4) / max(len(names), 1)))
    top = 40
    largest = max((count for row in counts for count in row), default=1) or 1
    wrong = max((count for i, row in enumerate(counts) for j, count in enumerate(row) if i != j), default=1) or 1
    body = [text_at(0, 12, "expected down, predicted across", kind="n")]
    for i, row in enumerate(counts):
        body.append(text_at(left - 8, top + size * i + size / 2 + 5, _fit(names[i], left - 8), anchor="end"))
        if size >= 18:
            body.append(text_at(left + size * (i + 0.5), top - 5, _fit(names[i], size), anchor="middle"))
        for j, count in enumerate(row):
            share = count / (largest if i == j else wrong)
            kind = ("bar" if i == j else "bad") if count else "none"
            x, y = left + size * j, top + size * i
            body.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{size - 2:.1f}" height="{size - 2:.1f}" rx="3" class="{kind}" '
                f'fill-opacity="{0.2 + 0.8 * share if count else 1:.2f}"/>'
            )
            if count and size >= CHAR * len(str(count)) + 2:
                dark = "on" if share > 0.4 else "c"
                body.append(text_at(x + size / 2 - 1, y + size / 2 + 4, str(count), kind=dark, anchor="middle"))
    return svg(left + size * len(names) + 4, top + size * len(names) + 4, body, "confusion matrix")


def scatter(points: Sequence[Sequence[float]], width: int = WIDE) -> str:
    """Expected across, predicted up; the diagonal is right."""
    size, pad = min(width, 400), 30
    values = [value for point in points for value in point if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return pad + (size - 2 * pad) * (value - low) / span

    body = [f'<line x1="{pad}" y1="{size - pad}" x2="{size - pad}" y2="{pad}" class="mark"/>']
    for expected, predicted in points:
        if math.isfinite(expected) and math.isfinite(predicted):
            body.append(f'<circle cx="{place(expected):.1f}" cy="{size - place(predicted):.1f}" r="2.5" class="dot"/>')
    body.append(text_at(size / 2, size - 6, f"expected, {number(low)} to {number(high)}", kind="n", anchor="middle"))
    body.append(text_at(4, 14, "predicted", kind="n"))
    return svg(size, size, body, "expected against predicted")


def wins(gate: dict[str, Any], width: int = WIDE) -> str:
    """Rows that only one of the two gets right."""
    pairs = [("only the new one is right", gate["wins"]), ("only the champion is right", gate["losses"])]
    return bars(pairs, "paired wins and losses", width)


def drift(windows: Sequence[dict[str, Any]], width: int = WIDE) -> str:
    """Each window's score against its threshold."""
    left = min(width * 0.3, CHAR * max((len(window["label"]) for window in windows), default=1) + 14)
    room, height = width - left - 130, 40 * len(windows) + 24
    largest = max([1e-9, *(max(window["score"], window["threshold"]) for window in windows)])
    body = []
    for index, window in enumerate(windows):
        y, loud = 40 * index, window["is_alert"]
        score, limit = room * window["score"] / largest, room * window["threshold"] / largest
        body.append(text_at(left - 10, y + 23, _fit(window["label"], left - 10), anchor="end"))
        body.append(
            f'<rect x="{left:.1f}" y="{y + 8}" width="{max(score, 1):.1f}" height="20" rx="3" '
            f'class="{"bad" if loud else "bar"}"/>'
        )
        body.append(
            f'<line x1="{left + limit:.1f}" y1="{y + 2}" x2="{left + limit:.1f}" y2="{y + 34}" class="threshold"/>'
        )
        word = f"{window['score']:.2f} {'>' if loud else '≤'} {window['threshold']:.2f} {'ALERT' if loud else 'quiet'}"
        body.append(text_at(left + max(score, limit) + 8, y + 23, word, kind="b" if loud else "n"))
    body.append(text_at(left, height - 4, "the line is the window's threshold", kind="n"))
    return svg(width, height, body, "drift of every window")


def lineage(names: Sequence[tuple[str, str]], width: int = WIDE) -> str:
    """Boxes from left to right, on a narrow screen from top to bottom: what became of what."""
    body = []
    if width < 500:
        for index, (name, digest) in enumerate(names):
            y = index * 46 + 2
            body.append(f'<rect x="1" y="{y}" width="{width - 2}" height="32" rx="6" class="box"/>')
            body.append(text_at(14, y + 21, name) + text_at(width - 14, y + 21, digest, kind="n", anchor="end"))
            if index:
                body.append(f'<path d="M{width / 2} {y - 13} v10 m-4 -4 l4 4 l4 -4" class="arrow"/>')
        return svg(width, 46 * len(names), body, "lineage")
    each = (width - 24 * (len(names) - 1)) / max(len(names), 1)
    for index, (name, digest) in enumerate(names):
        x = index * (each + 24)
        body.append(f'<rect x="{x + 1:.1f}" y="2" width="{each - 2:.1f}" height="44" rx="6" class="box"/>')
        body.append(text_at(x + each / 2, 22, name, anchor="middle"))
        body.append(text_at(x + each / 2, 38, digest, kind="n", anchor="middle"))
        if index:
            body.append(f'<path d="M{x - 20:.1f} 24 h16 m-4 -4 l4 4 l-4 4" class="arrow"/>')
    return svg(width, 50, body, "lineage")
