"""The picture of `Smaller`: how fast a variant is against what it may lose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from millrace.control.charts import CHAR, WIDE, svg, text_at

HEIGHT, TOP = 270, 18


def pareto(variants: Sequence[dict[str, Any]], chosen: str, limit: float, unit: str, width: int = WIDE) -> str:
    """Speed across and loss up, both with their intervals; the limit is a line, the served one is filled.

    Args:
        variants: VariantFacts as plain data, the base first.
        chosen: The variant that is served.
        limit: The largest acceptable loss, a share.
        unit: How a loss is written: "pp" or "% of the error".
        width: Pixels.
    """
    points = [_point(variant) for variant in variants]
    left, right = 34.0, width - 12.0
    most = max([limit * 1.4, *(point["bound"] for point in points)]) or 1.0
    least = min(0.0, *(point["drop"] for point in points))
    low = min([0.9, *(point["low"] for point in points)]) * 0.97
    high = max([1.1, *(point["high"] for point in points)]) * 1.03

    def across(speed: float) -> float:
        return left + (right - left) * (speed - low) / (high - low)

    def up(loss: float) -> float:
        return TOP + (HEIGHT - TOP - 48) * (1 - (loss - least) / (most - least))

    body = [
        f'<line x1="{left}" y1="{up(limit):.1f}" x2="{right}" y2="{up(limit):.1f}" class="limit"/>',
        text_at(right, up(limit) - 6, f"limit {limit * 100:g} {unit}", kind="b", anchor="end"),
        f'<line x1="{left}" y1="{up(0):.1f}" x2="{right}" y2="{up(0):.1f}" class="axis"/>',
        text_at(left - 8, up(0) + 4, "0", kind="n", anchor="end"),
        text_at(0, 11, "↑ loses, up to its bound", kind="n"),
        text_at((left + right) / 2, HEIGHT - 6, "best speed-up →", kind="n", anchor="middle"),
        text_at(left, HEIGHT - 6, f"{low:.1f}x", kind="n"),
        text_at(right, HEIGHT - 6, f"{high:.1f}x", kind="n", anchor="end"),
    ]
    taken = [(right - CHAR * len(f"limit {limit * 100:g} {unit}"), up(limit) - 18, right, up(limit))]
    places = [(across(point["speed"]), up(point["drop"])) for point in points]
    taken += [(x - 6, y - 6, x + 6, y + 6) for x, y in places]
    for index, (point, (x, y)) in enumerate(zip(points, places, strict=True)):
        if index:
            top = up(max(point["bound"], point["drop"]))
            body.append(f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{top:.1f}" class="whisker"/>')
            body.append(f'<line x1="{x - 4:.1f}" y1="{top:.1f}" x2="{x + 4:.1f}" y2="{top:.1f}" class="whisker"/>')
            start, end = across(point["low"]), across(point["high"])
            taken += [(x - 2, top, x + 2, y), (start, y - 2, end, y + 2)]
            body.append(f'<line x1="{start:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{y:.1f}" class="whisker"/>')
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" class="{"pick" if point["name"] == chosen else "spot"}"/>'
        )
    for point, (x, y) in zip(points, places, strict=True):
        body.append(_label(point["name"], x, y, right, taken))
    return svg(width, HEIGHT, body, "loss against speed of every variant")


def _point(variant: dict[str, Any]) -> dict[str, Any]:
    guarantee = variant.get("guarantee") or {}
    best = max(variant.get("latency") or [{}], key=lambda one: one.get("speedup", 1.0))
    drop, speed = guarantee.get("drop") or 0.0, best.get("speedup", 1.0)
    bound = guarantee.get("bound")
    return {
        "name": variant["name"], "drop": drop, "bound": drop if bound is None else bound, "speed": speed,
        "low": best.get("low", speed), "high": best.get("high", speed),
    }  # fmt: skip


def _label(name: str, x: float, y: float, right: float, taken: list[tuple[float, float, float, float]]) -> str:
    """Put a name beside its point where nothing else stands; takes the place."""
    long = CHAR * len(name)
    best: tuple[float, tuple[float, float, float, float], str] | None = None
    for distance in (0, 16, 32, 48):
        for side, down in (("start", -8), ("start", 18), ("end", -8), ("end", 18)):
            base = y + down + (distance if down > 0 else -distance)
            begin = x + 10 if side == "start" else x - 10 - long
            box = (begin, base - 11, begin + long, base + 3)
            cost = sum(_overlap(box, other) for other in taken) + distance * 0.5
            if box[0] < 0 or box[2] > right or box[1] < 14 or box[3] > HEIGHT - 20:
                cost += 10_000
            if best is None or cost < best[0]:
                best = (cost, box, side)
    assert best is not None
    _, box, side = best
    taken.append(box)
    return text_at(box[0] if side == "start" else box[2], box[3] - 3, name, anchor=side)


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
