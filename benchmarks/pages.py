"""The web pages: bytes and time of the first page, of sorting, filtering and paging, and of a long curve.

Bytes are what crosses the wire for a first visit (HTML, styles, scripts, icon; gzip). Server times are medians
of requests over one open connection. Browser times are of headless Chromium with an empty cache, from the
navigation's start; without Playwright or Chromium they are left out.

    python benchmarks/pages.py [RUNS …]
"""

from __future__ import annotations

import importlib.util
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from millrace.core.ids import new_id
from millrace.core.types import MetricPoint, Run
from millrace.testing.server import RunningServer
from millrace.wiring import open_dispatcher

REPEATS = 21
CURVE_POINTS = 100_000
BATCH = 1000
VISITS = 8
FILTER = "metrics.accuracy > 0.5 and metrics.loss < 0.5 and params.optimizer = 'sgd'"
TIMES = """[performance.getEntriesByName("first-contentful-paint")[0].startTime,
  performance.getEntriesByType("navigation")[0].loadEventEnd]"""


def fill(home: Path, runs: int) -> str:
    """Runs with three metrics and five parameters each, and one with a long curve; the id of that."""
    dispatcher = open_dispatcher(str(home))
    records, rng, now = dispatcher.services.records, random.Random(0), time.time()
    for first in range(0, runs, BATCH):
        with records.transaction() as transaction:
            for number in range(first, min(first + BATCH, runs)):
                started = now - (runs - number) * 60
                run = Run(
                    id=new_id(), name=f"sweep-{number:05d}", project=f"project-{number % 5}", state="succeeded",
                    created_at=started, started_at=started, ended_at=started + rng.uniform(5, 400),
                )  # fmt: skip
                transaction.put(run, expect_version=0)
                points = [
                    MetricPoint(run.id, name, step, rng.random(), started)
                    for name in ("accuracy", "loss", "f1")
                    for step in range(2)
                ]
                params = {"lr": f"{10 ** rng.uniform(-5, -1):.3g}", "depth": str(rng.randrange(2, 12))}
                params |= {"optimizer": rng.choice(["adamw", "sgd", "lion"]), "seed": str(number), "epochs": "20"}
                transaction.log(run.id, points=points, params=params)
    long = Run(id=new_id(), name="long", state="succeeded", created_at=now, started_at=now, ended_at=now)
    with records.transaction() as transaction:
        transaction.put(long, expect_version=0)
        values = (MetricPoint(long.id, "loss", step, rng.random(), now + step) for step in range(CURVE_POINTS))
        transaction.log(long.id, points=list(values))
    dispatcher.close()
    return long.id


def first_visit_bytes(client: httpx.Client) -> dict[str, int]:
    """Compressed bytes of the first page and of everything that it names, by kind."""
    html, size = fetch(client, "/")
    sizes = {"html": size}
    for url in sorted(set(re.findall(rb'(?:href|src)="(/static/[^"]+)"', html))):
        kind = url.decode().rsplit(".", 1)[1]
        sizes[kind] = sizes.get(kind, 0) + fetch(client, url.decode())[1]
    return sizes


def fetch(client: httpx.Client, path: str) -> tuple[bytes, int]:
    """The content, and how many bytes it had on the wire."""
    with client.stream("GET", path) as answer:
        answer.raise_for_status()
        content = answer.read()
        return content, answer.num_bytes_downloaded


def median_ms(client: httpx.Client, path: str) -> float:
    """Milliseconds until the whole answer is there."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        client.get(path).raise_for_status()
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times)


def browser_ms(urls: list[str]) -> list[tuple[float, float]] | None:
    """First contentful paint and load of each page, medians of visits in turn, each with an empty cache."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None or importlib.util.find_spec("playwright") is None:
        return None
    sync_playwright: Any = importlib.import_module("playwright.sync_api").sync_playwright
    found: dict[str, list[list[float]]] = {url: [] for url in urls}
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(VISITS):
            for url in urls:
                context = browser.new_context()
                page = context.new_page()
                page.goto(url, wait_until="load")
                page.wait_for_timeout(300)
                found[url].append(page.evaluate(TIMES))
                context.close()
        browser.close()
    medians = []
    for url in urls:
        paints, loads = zip(*found[url][1:], strict=True)  # the first one starts the browser's processes
        medians.append((statistics.median(paints), statistics.median(loads)))
    return medians


def measure(runs: int) -> None:
    """Print the figures of a home with so many runs."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        long = fill(home, runs)
        with RunningServer(home) as server, httpx.Client(base_url=server.url, timeout=60) as client:
            sizes = first_visit_bytes(client)
            parts = ", ".join(f"{kind} {size / 1e3:.1f}" for kind, size in sizes.items())
            print(f"{runs:,} runs")
            print(f"  first visit, gzip       {sum(sizes.values()) / 1e3:6.1f} KB  ({parts}; aim <= 100)")
            for name, path in {
                "first page": "/",
                "ordered by a metric": "/runs?sort=-metrics.accuracy",
                "three-clause filter": "/runs?q=" + quote(FILTER),
                "last page": f"/runs?page={runs // 100}",
                "events": "/events",
                "run with a long curve": f"/runs/{long}",
                "its curve, 100k points": f"/pages/data/curves?metric=loss&runs={long}",
            }.items():
                print(f"  {name:<23} {median_ms(client, path):6.1f} ms")
            seen = browser_ms([server.url, f"{server.url}/runs/none"])
            if seen is not None:
                (paint, load), (least, _) = seen
                print(
                    f"  in Chromium             {paint:6.1f} ms to first paint, {load:.0f} ms to load (aim <= 500); "
                    f"a page with one line {least:.0f} ms"
                )


def main() -> None:
    """Measure homes of several sizes."""
    for runs in [int(text) for text in sys.argv[1:]] or [5_000, 10_000]:
        measure(runs)


if __name__ == "__main__":
    main()
