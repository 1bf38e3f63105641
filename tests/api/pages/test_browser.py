"""The pages in a real browser: nothing in the console, nothing that axe finds serious, nothing wider than a phone."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from millrace.client.http import HttpTransport
from millrace.core.types import MetricPoint, Step
from millrace.testing.server import RunningServer
from millrace.wiring import open_dispatcher

playwright_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(__file__).parent / "vendor" / "axe.min.js"
# The same document twice: what a dark scheme changes is colours.
AXE_RULES = {"light": "{}", "dark": '{runOnly: ["color-contrast", "link-in-text-block"]}'}
pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]
Open = Callable[..., Any]
WIDER = """
[...document.querySelectorAll("body *")].filter((one) => one.getBoundingClientRect().right > innerWidth + 1
  && !one.closest(".scroll"))
  .map((one) => one.outerHTML.slice(0, 120))
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    with playwright_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any, running: RunningServer) -> Iterator[Open]:
    """Opens a page of the server; at the end the console must have been silent."""
    contexts, said = [], []

    def go(path: str, *, width: int = 1280, scheme: str = "light", bypass_csp: bool = False) -> Any:
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 1800}, bypass_csp=bypass_csp
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(running.url + path)
        return page

    yield go
    for context in contexts:
        context.close()
    assert said == []


def drawn(page: Any) -> None:
    """Every curve in view is there."""
    in_view = "[...document.querySelectorAll('.plot')].filter((one) => one.getBoundingClientRect().top < innerHeight)"
    until(page, f"{in_view}.every((plot) => plot.childElementCount)")


def until(page: Any, expression: str) -> None:
    """Poll from here: the page's own policy forbids what `wait_for_function` does."""
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(visit: Open, page_paths: dict[str, str], scheme: str) -> None:
    page = visit("/", scheme=scheme, bypass_csp=True)
    origin = page.url.rstrip("/")
    found = {}
    for name, path in {**page_paths, "menu": "/"}.items():
        page.goto(origin + path)
        if name == "menu":
            page.click("#columns summary")
        drawn(page)
        page.add_script_tag(path=AXE)
        result = page.evaluate(f"axe.run(document, {AXE_RULES[scheme]})")
        bad = [(one["id"], [node["html"][:200] for node in one["nodes"][:3]]) for one in result["violations"]
               if one["impact"] in ("serious", "critical")]  # fmt: skip
        if bad:
            found[name] = bad
    assert found == {}


def test_a_phone_need_not_scroll_sideways(visit: Open, page_paths: dict[str, str]) -> None:
    page = visit("/", width=400)
    origin = page.url.rstrip("/")
    for name, path in page_paths.items():
        page.goto(origin + path)
        drawn(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 400, (name, page.evaluate(WIDER))
        assert page.evaluate("window.hacked") is None, name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_dossier_is_readable_on_every_screen_and_on_paper(visit: Open, web: Any, scheme: str) -> None:
    page = visit("/models/digits/versions/1", width=400, scheme=scheme, bypass_csp=True)
    page.set_content(web.get("/models/digits/versions/1/dossier").text)  # its own policy lets no script look at it
    assert page.evaluate("document.documentElement.scrollWidth") <= 400, page.evaluate(WIDER)
    page.add_script_tag(path=AXE)
    found = page.evaluate(f"axe.run(document, {AXE_RULES[scheme]})")["violations"]
    assert [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")] == []
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_curves_are_drawn_and_follow_their_options(visit: Open, page_paths: dict[str, str]) -> None:
    page = visit(page_paths["compare"])
    drawn(page)
    assert page.locator(".plot canvas").count() >= 2
    with page.expect_response(lambda answer: "x=time" in answer.url):
        page.select_option("#x", "time")
    assert "x=time" in page.url
    page.mouse.move(0, 0)
    page.locator(".plot .u-over").first.hover()
    until(page, "[...document.querySelectorAll('output')].some((one) => one.value.includes(' s'))")


def test_parallel_coordinates_have_a_line_per_run(visit: Open, filled: Any) -> None:
    page = visit(f"/compare?runs={','.join(filled.sweep[:4])}")
    page.wait_for_selector(".parallel svg path")
    assert page.locator(".parallel svg path").count() == 4
    assert page.locator(".parallel svg line.axis").count() == 4  # lr, seed, acc, loss
    page.locator(".legend li").first.hover()
    assert page.locator(".parallel path.dim").count() == 3


def test_runs_are_ticked_and_compared(visit: Open) -> None:
    page = visit("/runs?project=vision&sort=name")
    button = page.locator("#compare")
    assert button.is_disabled()
    page.locator("input[name=runs]").nth(0).check()
    page.locator("input[name=runs]").nth(2).check()
    assert button.inner_text() == "Compare 2"
    button.click()
    page.wait_for_url("**/compare?**")
    assert page.locator("h1").inner_text() == "Compare 2 runs"


def test_columns_and_filters_work_by_keyboard(visit: Open) -> None:
    page = visit("/runs?project=vision")
    page.focus("#columns summary")
    page.keyboard.press("Enter")
    page.locator("#columns input[value='params.seed']").uncheck()
    page.locator("#columns input[value='tags.owner']").check()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.textContent") == "Columns"
    page.keyboard.press("Enter")
    page.locator("#columns button").press("Enter")
    page.wait_for_url("**column=tags.owner**")
    assert "owner" in page.locator("thead").inner_text()
    assert "seed" not in page.locator("thead").inner_text()
    page.fill("#q", "metrics.acc > 0.7")
    page.press("#q", "Enter")
    page.wait_for_url("**metrics.acc**")
    assert "column=tags.owner" in page.url
    assert "project=vision" in page.url


def test_new_runs_appear_by_themselves_and_ticks_stay(visit: Open, running: RunningServer) -> None:
    page = visit("/")
    page.locator("input[name=runs]").nth(1).check()
    ticked = page.locator("input[name=runs]").nth(1).get_attribute("value")
    transport = HttpTransport(running.url)
    run = transport.call("run.track", {"name": "just begun", "project": "live"})
    row = page.locator(f"#r{run.id}")
    row.wait_for(timeout=15_000)
    assert "running" in row.inner_text()
    assert page.locator(f"input[value='{ticked}']").is_checked()
    transport.call("run.end", {"run": run.id})
    until(page, f"document.querySelector('#r{run.id}')?.innerText.includes('succeeded')")
    transport.close()


def test_a_running_run_draws_on(visit: Open, running: RunningServer) -> None:
    transport = HttpTransport(running.url)
    run = transport.call("run.track", {"name": "drawing", "project": "live"})

    def log(first: int) -> None:
        points = [MetricPoint(run.id, "loss", step, 1.0 / (step + 1), time.time()) for step in range(first, first + 5)]
        transport.call("run.log", {"run": run.id, "points": points})

    page = visit(f"/runs/{run.id}")
    assert "Nothing logged yet" in page.locator("main").inner_text()
    log(0)
    page.wait_for_selector(".plot canvas", timeout=20_000)
    log(5)
    with page.expect_response(
        lambda answer: "/pages/data/curves" in answer.url and answer.json()["series"][0]["points"] == 10
    ):
        pass
    transport.call("run.end", {"run": run.id})
    page.wait_for_selector("[data-part=state] .state.succeeded", timeout=15_000)
    transport.close()


def test_a_log_goes_on(visit: Open, filled: Any, running: RunningServer, tmp_path: Path) -> None:
    log = tmp_path / "step.log"
    log.write_text("first line\n")
    home = open_dispatcher(str(filled.folder))
    run = home.call("run.track", {"name": "printing", "project": "live"})
    step = {"name": "train", "stage": "train", "state": "running", "started_at": time.time(), "log_path": str(log)}
    _put_step(home, run.id, **step)
    page = visit(f"/runs/{run.id}")
    assert "first line" in page.locator("pre.log").inner_text()
    with log.open("a") as file:
        file.write(f"second line {filled.text}\n")
    until(page, "document.querySelector('pre.log').textContent.includes('second line <script>')")
    _put_step(home, run.id, **{**step, "state": "succeeded"})
    until(page, "!document.querySelector('pre.log').dataset.tail")
    home.call("run.end", {"run": run.id})
    home.close()


def _put_step(home: Any, run_id: str, **fields: Any) -> None:
    home.services.records.put(Step(id=f"step-{run_id}", run_id=run_id, **fields))


def test_addresses_that_mlflow_prints_land_on_our_pages(visit: Open, filled: Any) -> None:
    page = visit("/runs")
    origin = page.url.removesuffix("/runs")
    for address, landed in {
        f"#/experiments/0/runs/{filled.pipeline}": f"/runs/{filled.pipeline}",
        f"#/experiments/7/runs/{filled.pipeline}/artifacts": f"/runs/{filled.pipeline}",
        "#/experiments/0?searchFilter=a": "/runs?project=default",
        "#/models/digits/versions/1": "/models/digits/versions/1",
    }.items():
        page.goto(f"{origin}/{address}", wait_until="commit")
        page.wait_for_url(origin + landed)
        page.goto(f"{origin}/runs")
    page.goto(f"{origin}/#//elsewhere.example/")
    assert page.url == f"{origin}/#//elsewhere.example/"
    page.evaluate("location.hash = '#/models/digits'")  # in the tab that is open already
    page.wait_for_url(f"{origin}/models/digits")
