"""Every page: whole, safe whatever is in the records, with problems and empty states that help."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.api.pages import live
from millrace.api.pages.rendering import POLICY
from millrace.core.types import Event, LoggedModel
from millrace.testing.server import RunningServer
from millrace.wiring import open_dispatcher

VOID = {"meta", "link", "input", "img", "br", "hr"}


class Reading(HTMLParser):
    """Collects what a page is made of, and what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.feed(html)
        self.wrong += [f"<{tag}> is never closed" for tag in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        names = [name for name, _ in attrs]
        self.wrong += [f"{tag} has {name}" for name in names if name == "style" or name.startswith("on")]
        self.wrong += [f"{tag} has {name} twice" for name in names if names.count(name) > 1]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}> closes something else")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style") and data.strip():
            self.wrong.append(f"inline {self.open[-1]}: {data[:40]}")


def test_every_page_is_whole_and_has_nothing_inline(web: httpx.Client, page_paths: dict[str, str]) -> None:
    for name, path in page_paths.items():
        answer = web.get(path)
        assert answer.status_code == 200, (name, answer.text[-2000:])
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        page = Reading(answer.text)
        assert page.wrong == [], name
        ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(ids) == len(set(ids)), name
        assert [tag for tag, _ in page.elements].count("h1") == 1, name


def test_nothing_of_the_records_becomes_markup(web: httpx.Client, page_paths: dict[str, str], filled: Any) -> None:
    seen = 0
    for name, path in page_paths.items():
        text = web.get(path).text
        assert "<script>" not in text, name
        assert not re.search(r"<img[^>]*onerror", text), name
        seen += "&lt;script&gt;window.hacked" in text
    assert seen >= 8  # it is there to be seen, as text


def test_every_link_of_every_page_leads_somewhere(web: httpx.Client, page_paths: dict[str, str]) -> None:
    links: set[str] = set()
    for path in page_paths.values():
        for tag, attributes in Reading(web.get(path).text).elements:
            if tag in ("a", "link", "script", "img"):
                links.add(attributes.get("href") or attributes.get("src") or "")
    links = {link for link in links if link.startswith("/")}
    assert len(links) > 60
    broken = {link: status for link in sorted(links) if (status := web.get(link).status_code) != 200}
    assert broken == {}


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/runs/nosuch", 404, "no run with the id &#39;nosuch&#39;"),
        ("/runs/nosuch/report", 404, "no run with the id"),
        ("/runs?q=metrics.acc+%3E", 400, "the filter cannot be read"),
        ("/runs?sort=nothing", 400, "to sort by"),
        ("/runs?state=asleep", 400, "there is no state"),
        ("/runs?column=nothing", 400, "want a column such as"),
        ("/compare", 400, "at least two runs"),
        ("/datasets/nosuch@1", 404, "there is no dataset"),
        ("/datasets/digits@9", 404, "there is no dataset"),
        ("/models/nosuch", 404, "there is no model"),
        ("/models/digits/versions/9", 404, "has no version 9"),
        ("/endpoints/nosuch", 404, "there is no endpoint"),
        ("/events?before=x", 400, "must be the number of an event"),
        ("/events?subject=run:nosuch", 200, "No such events"),
        ("/runs?q=nothing-has-this-name", 200, "No run fits"),
    ],
)
def test_what_is_wrong_is_said_on_a_page(web: httpx.Client, path: str, status: int, says: str) -> None:
    answer = web.get(path)
    assert answer.status_code == status
    assert answer.headers["content-type"].startswith("text/html")
    assert says in answer.text
    assert Reading(answer.text).wrong == []


def test_a_hostile_request_is_shown_as_text(web: httpx.Client, filled: Any) -> None:
    for path in ("/runs", "/events"):
        answer = web.get(path, params={"q": filled.text, "subject": filled.text})
        assert Reading(answer.text).wrong == []
        assert "<script>" not in answer.text
    assert "<script>" not in web.get(f"/runs/{filled.text.replace('/', '')}").text


def test_scripts_and_styles_are_kept_for_good(web: httpx.Client) -> None:
    html = web.get(f"/compare?runs={','.join(re.findall(r'value=.([0-9a-f]{32})', web.get('/').text)[:2])}").text
    urls = set(re.findall(r'"(/static/[^"]+)"', html))
    assert len(urls) >= 5
    for url in urls:
        plain = web.get(url, headers={"Accept-Encoding": "identity"})
        packed = web.get(url, headers={"Accept-Encoding": "gzip"})
        assert packed.headers["content-encoding"] == "gzip"
        assert plain.content == packed.content
        assert plain.headers["cache-control"] == "public, max-age=31536000, immutable"
        again = web.get(url, headers={"If-None-Match": plain.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert web.get("/static/style.000000000000.css").status_code == 404
    assert web.get("/static/../api/app.py").status_code == 404


def test_pages_are_compressed_and_small(web: httpx.Client, page_paths: dict[str, str]) -> None:
    with web.stream("GET", page_paths["runs"], headers={"Accept-Encoding": "gzip"}) as answer:
        assert answer.headers["content-encoding"] == "gzip"
        assert len(b"".join(answer.iter_raw())) < 10_000
    plain = web.get(page_paths["runs"], headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers


def test_the_report_is_sealed_off(web: httpx.Client, filled: Any) -> None:
    answer = web.get(f"/runs/{filled.pipeline}/report")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("sandbox;")
    assert "script-src" not in policy
    assert "allow-scripts" not in policy
    assert "digits" in answer.text
    assert "accuracy" in answer.text
    page = web.get(f"/runs/{filled.pipeline}").text
    assert re.search(rf'href="/runs/{filled.pipeline}/report" target="_blank" rel="noopener"', page)
    assert web.get(f"/runs/{filled.sweep[0]}/report").status_code == 404


def test_files_are_sent_to_be_kept_never_to_be_run(web: httpx.Client, filled: Any) -> None:
    listing = web.get(f"/runs/{filled.pipeline}/files/train/model")
    assert "model.onnx" in listing.text
    for path, content in (
        (f"/runs/{filled.pipeline}/files/train/model/model.onnx", b"not really a graph"),
        (f"/runs/{filled.hostile}/files/notes/page.html", filled.text.encode()),
    ):
        answer = web.get(path)
        assert answer.content == content
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["content-disposition"].startswith("attachment;")
        assert answer.headers["content-security-policy"].startswith("sandbox;")
    for path in ("train/nosuch", "train/model/nosuch", "notes/page.html/deeper", "../../etc/passwd", "train"):
        assert web.get(f"/runs/{filled.hostile}/files/{path}").status_code == 404


def test_a_log_is_shown_and_goes_on_where_the_page_stopped(web: httpx.Client, filled: Any) -> None:
    page = web.get(f"/runs/{filled.pipeline}?log=train").text
    assert "epoch 1\n&lt;script&gt;" in page
    assert "data-tail" not in page  # its step has ended
    assert web.get(f"/runs/{filled.pipeline}?log=nosuch").status_code == 404


def test_compare_marks_what_differs(web: httpx.Client, filled: Any) -> None:
    path = f"/compare?runs={filled.sweep[0]},{filled.sweep[2]}"
    page = Reading(web.get(path).text)
    differing = {attributes.get("data-axis") for _, attributes in page.elements if attributes.get("class") == "differs"}
    assert differing == {"seed", "acc", "loss"}  # both have lr 0.01
    only = web.get(f"{path}&only=differences").text
    assert "lr" not in re.findall(r'<th scope="row" class="key">([^<]*)<', only)
    assert web.get("/compare?runs=" + ",".join(f"r{number}" for number in range(51))).status_code == 400


def test_figures_are_on_the_pages(web: httpx.Client, page_paths: dict[str, str]) -> None:
    for name, texts in {
        "run": ("accuracy", "99 %", "int8 is the fastest", "state cached", "first time"),
        "dataset": ("1,840", "1,047", "few rows", "duplicate"),
        "numeric dataset": ("0 to 10", "Rows per value of the label"),
        "model": ("champion v2", "v1 → v2", "first version"),
        "version": ("digits@1", "certified", "0.45 pp", "of 1.00", "3.7× smaller", "<h3>digits</h3>"),
        "endpoint": ("170 µs", "2 % false alarms asked for, 1.5 % measured", "quiet", "alerts"),
        "events": ("model.promote", "model:digits@2"),
    }.items():
        html = web.get(page_paths[name]).text
        for text in texts:
            assert text in html, (name, text)


def test_events_are_paged_newest_first(tmp_path: Path) -> None:
    dispatcher = open_dispatcher(str(tmp_path / "home"))
    records = dispatcher.services.records
    with records.transaction() as transaction:
        for number in range(250):
            subject = "run:a" if number % 2 else "run:b"
            transaction.append(Event(at=float(number), actor="a", verb="run.track", subject=subject))
    records.seal()
    for subject, expected in (("", range(250, 0, -1)), ("run:a", range(250, 0, -2))):
        seen: list[int] = []
        before: int | None = None
        while True:
            page = live._before(dispatcher.services, before or 10**9, subject or None) if before else live._before(
                dispatcher.services, live.last_event(dispatcher.services) + 1, subject or None
            )  # fmt: skip
            shown = [event.seq or 0 for event in page[: live.EVENTS_PER_PAGE]]
            seen += shown
            if len(page) <= live.EVENTS_PER_PAGE:
                break
            before = shown[-1]
        assert seen == list(expected)
    dispatcher.close()


class Numbered:
    """Services with `count` sealed events, and how often they were asked."""

    def __init__(self, count: int) -> None:
        self.count, self.asked, self.records = count, 0, self

    def events(self, since: int = 0, limit: int = 1) -> list[int]:
        self.asked += 1
        return [since + 1] if since < self.count else []


@given(st.integers(0, 10**12))
@settings(max_examples=200)
def test_the_newest_event_is_found_in_few_questions(count: int) -> None:
    services: Any = Numbered(count)
    assert live.last_event(services) == count
    assert services.asked <= 2 * max(count, 256).bit_length() + 4


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[httpx.Client]:
    with RunningServer(tmp_path / "home") as server, httpx.Client(base_url=server.url) as client:
        yield client


def test_an_empty_home_says_what_makes_the_first(empty: httpx.Client) -> None:
    for path, command in {
        "/": "millrace demo",
        "/datasets": "millrace run",
        "/models": "millrace models register model.onnx",
        "/endpoints": "millrace serve MODEL",
        "/events": "millrace demo",
    }.items():
        answer = empty.get(path)
        assert answer.status_code == 200
        assert f"<code>{command}</code>" in answer.text
        assert Reading(answer.text).wrong == []


def test_paths_of_mlflow_lead_to_our_pages(web: httpx.Client, filled: Any) -> None:
    model = "m-" + "0" * 32
    home = open_dispatcher(str(filled.folder))
    project = home.call("project.create", {"name": "two words"})
    home.services.records.put(LoggedModel(id=model, name="m", run_id=filled.pipeline))
    home.close()
    for path, place in {
        f"/experiments/{project.id}": f"/runs?project={project.project}",
        f"/experiments/{project.id}/runs/{filled.pipeline}/model-metrics": f"/runs/{filled.pipeline}",
        f"/experiments/{project.id}/models/{model}": f"/runs/{filled.pipeline}",
        f"/experiments/{project.id}/models/m-none": f"/runs?project={project.project}",
    }.items():
        answer = web.get(path)
        assert (answer.status_code, answer.headers["location"]) == (303, place), path
    assert web.get("/experiments/999").status_code == 404
