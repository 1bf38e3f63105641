"""Small pictures as inline SVG: no scripts, no requests, colours from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

WIDTH = 640


def _svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label, quote=True)}" '
        f'style="max-width:{width:g}px">{"".join(body)}</svg>'
    )


def _text(x: float, y: float, text: str, *, kind: str = "t", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(text)}</text>'


def bars(counts: Sequence[tuple[str, float]], label: str, formats: str = "{:.0f}") -> str:
    """Horizontal bars with their names and numbers.

    Example:
        >>> bars([("a", 3), ("b", 1)], "classes").count("<rect")
        2
    """
    largest = max((value for _, value in counts), default=1) or 1
    name_width = min(160, 8 * max((len(name) for name, _ in counts), default=1) + 12)
    body = []
    for index, (name, value) in enumerate(counts):
        y = index * 24
        width = (WIDTH - name_width - 70) * value / largest
        body.append(_text(name_width - 8, y + 16, name[:22], anchor="end"))
        body.append(f'<rect x="{name_width}" y="{y + 4}" width="{max(width, 1):.1f}" height="16" rx="3" class="bar"/>')
        body.append(_text(name_width + width + 8, y + 16, formats.format(value), kind="n"))
    return _svg(WIDTH, max(24 * len(counts), 24), body, label)


def flow(total: int, kept: int, rejected: Sequence[tuple[str, int]]) -> str:
    """Rows in = kept + rejected, as one divided bar."""
    body, x = [], 0.0
    parts = [("kept", kept, "bar"), *((reason, count, "bad") for reason, count in rejected if count)]
    for index, (name, count, kind) in enumerate(parts):
        width = WIDTH * count / max(total, 1)
        body.append(f'<rect x="{x:.1f}" y="0" width="{max(width - 1, 1):.1f}" height="28" rx="3" class="{kind}"/>')
        if index == 0:
            body.append(f'<text x="12" y="19" class="on">{count} {name}</text>')
        x += width
    legend = ", ".join(f"{count} {name}" for name, count, _ in parts[1:]) or "none"
    body.append(_text(WIDTH, 46, f"rejected: {legend}", kind="n", anchor="end"))
    return _svg(WIDTH, 52, body, f"{total} rows in, {kept} kept")


def lines(series: Sequence[tuple[str, Sequence[float]]], label: str, mark: int | None = None) -> str:
    """Curves over epochs, each scaled to the height; the best epoch is marked.

    Args:
        series: Name and values, one per epoch.
        label: What the picture shows.
        mark: The epoch to mark, counted from 1.
    """
    height, left, right, top = 180, 8, 150, 12
    body = []
    for index, (name, values) in enumerate(series):
        finite = [value for value in values if value is not None and math.isfinite(value)]
        if not finite:
            continue
        low, high = min(finite), max(finite)
        span = (high - low) or 1.0
        step = (WIDTH - left - right) / max(len(values) - 1, 1)
        points = [
            (left + step * position, top + (height - 2 * top - 20) * (1 - (value - low) / span))
            for position, value in enumerate(values)
            if value is not None and math.isfinite(value)
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        body.append(f'<polyline points="{path}" class="line s{index % 3}"/>')
        x, y = points[-1]
        body.append(_text(x + 8, y + 4 + 14 * index, f"{name} {values[-1]:.4g}", kind=f"k{index % 3}"))
    if mark is not None and series and 1 <= mark <= len(series[0][1]):
        x = left + (WIDTH - left - right) / max(len(series[0][1]) - 1, 1) * (mark - 1)
        body.append(f'<line x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{height - 20}" class="mark"/>')
        anchor = "end" if x > WIDTH / 2 else "start"
        body.append(_text(x, height - 4, f"best epoch {mark}", kind="n", anchor=anchor))
    return _svg(WIDTH, height, body, label)


def matrix(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix: expected down, predicted across; mistakes are coloured."""
    size = max(18, min(44, 480 // max(len(names), 1)))
    left = min(120, 8 * max(len(name) for name in names) + 16) if names else 20
    top = 40
    largest = max((count for row in counts for count in row), default=1) or 1
    wrong = max((count for i, row in enumerate(counts) for j, count in enumerate(row) if i != j), default=1) or 1
    body = [_text(0, 12, "expected down, predicted across", kind="n")]
    for i, row in enumerate(counts):
        body.append(_text(left - 8, top + size * i + size / 2 + 5, names[i][:14], anchor="end"))
        body.append(_text(left + size * i + size / 2, top - 5, names[i][:5], anchor="middle"))
        for j, count in enumerate(row):
            kind = "bar" if i == j else "bad"
            opacity = 0.15 + 0.75 * count / largest if i == j else (0.25 + 0.75 * count / wrong if count else 0.04)
            x, y = left + size * j, top + size * i
            body.append(
                f'<rect x="{x}" y="{y}" width="{size - 2}" height="{size - 2}" rx="3" class="{kind}" '
                f'fill-opacity="{opacity:.2f}"/>'
            )
            if count:
                body.append(_text(x + size / 2 - 1, y + size / 2 + 4, str(count), kind="c", anchor="middle"))
    return _svg(left + size * len(names) + 4, top + size * len(names) + 4, body, "confusion matrix")


def image(pixels: Sequence[float], shape: Sequence[int], size: float = 64) -> str:
    """A small grey image, or a heat map of values between 0 and 1 of the largest."""
    height, width = int(shape[0]), int(shape[1])
    low, high = min(pixels, default=0.0), max(pixels, default=1.0)
    span = (high - low) or 1.0
    cell = size / width
    body = []
    for index in range(min(len(pixels), height * width)):
        share = (pixels[index] - low) / span
        x, y = (index % width) * cell, (index // width) * cell
        body.append(
            f'<rect x="{x:.2f}" y="{y:.2f}" width="{cell + 0.05:.2f}" height="{cell + 0.05:.2f}" class="px" '
            f'fill-opacity="{share:.2f}"/>'
        )
    return _svg(size, cell * height, body, f"image {height} by {width}")


def scatter(points: Sequence[Sequence[float]]) -> str:
    """Expected across, predicted up; the diagonal is right."""
    size, pad = 360, 30
    values = [value for point in points for value in point]
    low, high = min(values, default=0.0), max(values, default=1.0)
    span = (high - low) or 1.0

    def place(value: float) -> float:
        return pad + (size - 2 * pad) * (value - low) / span

    body = [f'<line x1="{pad}" y1="{size - pad}" x2="{size - pad}" y2="{pad}" class="mark"/>']
    for expected, predicted in points:
        body.append(f'<circle cx="{place(expected):.1f}" cy="{size - place(predicted):.1f}" r="2.5" class="dot"/>')
    body.append(_text(size / 2, size - 6, f"expected {low:.4g} to {high:.4g}", kind="n", anchor="middle"))
    body.append(_text(4, 14, "predicted", kind="n"))
    return _svg(size, size, body, "expected against predicted")


def pareto(variants: Sequence[dict[str, Any]], chosen: str, limit: float, unit: str) -> str:
    """Speed across, loss up with its bound, the limit as a line; the chosen one is filled.

    Args:
        variants: VariantFacts as plain data, the base first.
        chosen: The variant that is served.
        limit: The largest acceptable loss, a share.
        unit: How a loss is written: "pp" or "%".
    """
    height, left, top = 240, 60, 16
    speeds = [max((one["speedup"] for one in variant["latency"]), default=1.0) for variant in variants]
    bounds = [((variant.get("guarantee") or {}).get("bound") or 0.0) for variant in variants]
    most = max([limit * 1.4, *bounds]) or 1.0
    low, high = min([0.8, *speeds]) * 0.95, max([1.2, *speeds]) * 1.08
    least = min(0.0, *((variant.get("guarantee") or {}).get("drop", 0.0) for variant in variants))

    def across(speed: float) -> float:
        return left + (WIDTH - left - 110) * (speed - low) / (high - low)

    def up(loss: float) -> float:
        return top + (height - top - 44) * (1 - (loss - least) / (most - least))

    body = [
        f'<rect x="{left}" y="{top}" width="{WIDTH - left - 10}" height="{max(up(limit) - top, 0):.1f}" class="zone"/>',
        f'<line x1="{left}" y1="{up(limit):.1f}" x2="{WIDTH - 10}" y2="{up(limit):.1f}" class="limit"/>',
        _text(WIDTH - 12, up(limit) - 5, f"limit {limit * 100:g} {unit}", kind="b", anchor="end"),
        f'<line x1="{left}" y1="{up(0):.1f}" x2="{WIDTH - 10}" y2="{up(0):.1f}" class="axis"/>',
        _text(left - 8, up(0) + 4, f"0 {unit}", kind="n", anchor="end"),
        _text(WIDTH / 2, height - 6, "best speed-up over the base →", kind="n", anchor="middle"),
        _text(left, height - 6, f"{low:.1f}x", kind="n"),
        _text(WIDTH - 12, height - 6, f"{high:.1f}x", kind="n", anchor="end"),
    ]
    for index, (variant, speed, bound) in enumerate(zip(variants, speeds, bounds, strict=True)):
        x, drop = across(speed), (variant.get("guarantee") or {}).get("drop", 0.0)
        kind = "pick" if variant["name"] == chosen else "dot"
        if index:
            body.append(f'<line x1="{x:.1f}" y1="{up(drop):.1f}" x2="{x:.1f}" y2="{up(bound):.1f}" class="whisker"/>')
        body.append(f'<circle cx="{x:.1f}" cy="{up(drop):.1f}" r="6" class="{kind}"/>')
        body.append(_text(x + 10, up(drop) + (16 if index % 2 else -8), variant["name"]))
    return _svg(WIDTH, height, body, "loss against speed of every variant")


def wins(gate: dict[str, Any]) -> str:
    """Rows that only one of the two gets right."""
    pairs = [("only the new one is right", gate["wins"]), ("only the champion is right", gate["losses"])]
    return bars(pairs, "paired wins and losses")


def drift(windows: Sequence[dict[str, Any]]) -> str:
    """Each window's score against its threshold."""
    height, left = 40 * len(windows) + 24, 110
    largest = max([1e-9, *(max(window["score"], window["threshold"]) for window in windows)]) * 1.08
    body = []
    for index, window in enumerate(windows):
        y = 40 * index
        score = (WIDTH - left - 90) * window["score"] / largest
        threshold = left + (WIDTH - left - 90) * window["threshold"] / largest
        kind = "bad" if window["is_alert"] else "bar"
        body.append(_text(left - 10, y + 22, window["label"], anchor="end"))
        body.append(f'<rect x="{left}" y="{y + 8}" width="{max(score, 1):.1f}" height="20" rx="3" class="{kind}"/>')
        body.append(f'<line x1="{threshold:.1f}" y1="{y + 2}" x2="{threshold:.1f}" y2="{y + 34}" class="limit"/>')
        word = "ALERT" if window["is_alert"] else "quiet"
        body.append(_text(left + score + 8, y + 23, f"{window['score']:.2f} {word}", kind="n"))
    body.append(_text(left, height - 4, "the line is the window's threshold", kind="n"))
    return _svg(WIDTH, height, body, "drift of every window")


def lineage(names: Sequence[tuple[str, str]]) -> str:
    """Boxes from left to right: what became of what."""
    count = max(len(names), 1)
    width = (WIDTH - 12 * (count - 1)) / count
    body = []
    for index, (name, digest) in enumerate(names):
        x = index * (width + 12)
        body.append(f'<rect x="{x:.1f}" y="2" width="{width:.1f}" height="44" rx="6" class="box"/>')
        body.append(_text(x + width / 2, 22, name, anchor="middle"))
        body.append(_text(x + width / 2, 38, digest, kind="n", anchor="middle"))
        if index:
            body.append(f'<path d="M{x - 11:.1f} 24 l9 0 m-4 -4 l4 4 l-4 4" class="axis" fill="none"/>')
    return _svg(WIDTH, 50, body, "lineage")
