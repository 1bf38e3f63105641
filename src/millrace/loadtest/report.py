"""A load test as a page: its numbers, latency by percentile and over time. No scripts, no requests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

import numpy as np

from millrace.loadtest.client import Measured
from millrace.loadtest.run import Ratio, Report, Row
from millrace.stats.hdr import HdrHistogram

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 300, 64, 16, 40
_MARKS = (0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999)
_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--soft:#667085;--line:#d6dae1;--a:#1f6feb;--b:#c2570c;--back:#fff}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#98a2b3;--line:#3a4250;--a:#6ea8fe;--b:#f59e5b}
:root{--back:#14181f}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--back)}
body{max-width:760px;margin:32px auto;padding:0 16px}
table{border-collapse:collapse;width:100%;margin:12px 0;font-variant-numeric:tabular-nums}
td,th{text-align:right;padding:4px 8px;border-bottom:1px solid var(--line)}
td:first-child,th:first-child{text-align:left;min-width:8em;overflow-wrap:anywhere}
div.wide{overflow-x:auto}svg{width:100%;min-width:540px;height:auto}text{font-size:12px;fill:var(--soft)}
.grid{stroke:var(--line)}.s0{stroke:var(--a);fill:none;stroke-width:2}.s1{stroke:var(--b);fill:none;stroke-width:2}
.k0{fill:var(--a);color:var(--a)}.k1{fill:var(--b);color:var(--b)}.thin{stroke-width:1;stroke-dasharray:3 3}
.bad{color:#d1242f;font-weight:600}.soft{color:var(--soft)}
"""


def milliseconds(value: float | None) -> str:
    """A latency for people.

    Example:
        >>> [milliseconds(value) for value in (0.0421, 3.14159, 1234.5, None)]
        ['0.042', '3.14', '1,234', '-']
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.1 else f"{value:.3f}"


def render_page(report: Report, results: Sequence[Measured]) -> str:
    """The whole page.

    Args:
        report: In words and numbers.
        results: What the pictures are drawn from.
    """
    names = " and ".join(escape(row.endpoint) for row in report.rows)
    legend = " ".join(f'<span class="k{k}">■ {escape(one.name)}</span>' for k, one in enumerate(results))
    parts = [
        f"<h1>Load test</h1><p>{names}<br><span class='soft'>{escape(report.text)}</span></p>",
        "<p class='bad'>Interrupted: of what was measured until then.</p>" if report.is_interrupted else "",
        _table(report.rows),
        "".join(_verdict(row) for row in report.rows),
        _ratios(report.ratios),
        f"<h2>Latency by percentile</h2><p>{legend}</p>{percentile_chart([one.histogram for one in results])}",
        f"<h2>Latency over time</h2><p>{legend} <span class='soft'>p50, dashed: p99</span></p>",
        time_chart([one.slices for one in results]),
    ]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Load test of {names}</title>"
        f"<meta name='viewport' content='width=device-width'><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _table(rows: Sequence[Row]) -> str:
    columns = list(rows[0].latency_ms)
    head = "".join(f"<th>{name} ms</th>" for name in columns)
    lines = [
        f"<tr><td>{escape(row.endpoint)}</td><td>{row.requests:,}</td><td>{row.answered_per_s:,.0f}</td>"
        f"<td{' class=bad' if row.failures else ''}>{row.failures:,}</td>"
        + "".join(f"<td>{milliseconds(row.latency_ms[name])}</td>" for name in columns)
        + "</tr>"
        for row in rows
    ]
    failed = "".join(
        f"<p class='bad'>{escape(row.endpoint)}: {escape(text)}</p>" for row in rows for text in failures_of(row)
    )
    return (
        "<div class='wide'><table><tr><th>Endpoint</th><th>Requests</th><th>Answered/s</th><th>Failed</th>"
        f"{head}</tr>{''.join(lines)}</table></div>{failed}"
    )


def failures_of(row: Row) -> list[str]:
    """What failed, in words.

    Args:
        row: Of an endpoint.
    """
    found = [f"{count:,} answers {status}" for status, count in row.statuses.items() if not status.startswith("2")]
    found += [f"{count:,} times {why}" for why, count in row.errors.items()]
    if row.unsent:
        found.append(f"{row.unsent:,} requests were due and could not be sent: all connections were waiting")
    return found


def _verdict(row: Row) -> str:
    if row.verdict is None:
        return ""
    kept = "kept" if row.verdict.is_kept else "<span class='bad'>missed</span>"
    p99 = f"{milliseconds(row.verdict.p99_ms)} ms" if row.verdict.p99_ms is not None else "beyond: more than 1 % failed"
    return f"<p>{escape(row.endpoint)}: p99 of at most {row.verdict.wanted_ms:g} ms {kept}: {p99}</p>"


def _ratios(ratios: Sequence[Ratio]) -> str:
    if not ratios:
        return ""
    lines = "".join(
        f"<tr><td>{one.percentile}</td><td>{one.ratio or math.nan:.3f}</td>"
        f"<td>{one.low or math.nan:.3f} to {one.high or math.nan:.3f}</td></tr>"
        for one in ratios
    )
    return (
        "<h2>The second over the first</h2><table><tr><th>Percentile</th><th>Ratio</th><th>95 % interval</th></tr>"
        f"{lines}</table>"
    )


def percentile_chart(histograms: Sequence[HdrHistogram]) -> str:
    """Latency against the percentile; each further nine takes as much room as the one before."""
    drawn = [one for one in histograms if one.total]
    if not drawn:
        return "<p>Nothing was answered.</p>"
    nines = max(math.log10(max(one.total, 10)) for one in drawn)
    shares = 1 - np.logspace(0, -nines, 160)
    curves = [[one.quantile(float(share)) * 1e3 for share in shares] for one in drawn]
    places = [-math.log10(max(1 - share, 10**-nines)) / nines for share in shares]
    marks = [(-math.log10(1 - mark) / nines, f"{mark * 100:.7g}%") for mark in _MARKS]
    return _chart([(curve, places, f"s{k}") for k, curve in enumerate(curves)], [m for m in marks if m[0] <= 1])


def time_chart(slices: Sequence[Sequence[HdrHistogram]]) -> str:
    """Median and 99th percentile of each slice of time."""
    curves: list[tuple[list[float], list[float], str]] = []
    for k, one in enumerate(slices):
        known = [(at, part) for at, part in enumerate(one) if part.total]
        places = [at / max(len(one) - 1, 1) for at, _ in known]
        curves.append(([part.quantile(0.5) * 1e3 for _, part in known], places, f"s{k}"))
        curves.append(([part.quantile(0.99) * 1e3 for _, part in known], places, f"s{k} thin"))
    curves = [curve for curve in curves if curve[0]]
    return _chart(curves, [(0.0, "begin"), (1.0, "end")]) if curves else ""


def _chart(curves: list[tuple[list[float], list[float], str]], marks: list[tuple[float, str]]) -> str:
    values = [max(value, 1e-3) for curve, _, _ in curves for value in curve]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values) * 1.0001))
    high = max(high, low + 1)

    def x_of(place: float) -> float:
        return _LEFT + place * (_WIDTH - _LEFT - 24)

    def y_of(value: float) -> float:
        share = (math.log10(max(value, 1e-3)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)

    body: list[str] = []
    for power in range(low, high + 1):
        y = y_of(10.0**power)
        body.append(f'<line x1="{_LEFT}" x2="{_WIDTH - 24}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        body.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{10.0**power:g} ms</text>')
    for place, text in marks:
        body.append(f'<text x="{x_of(place):.1f}" y="{_HEIGHT - 14}" text-anchor="middle">{text}</text>')
    for curve, places, kind in curves:
        points = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in zip(places, curve, strict=True))
        body.append(f'<polyline points="{points}" class="{kind}"/>')
    drawn = "".join(body)
    return (
        f'<div class="wide"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="latency">{drawn}</svg></div>'
    )
