"""Attacks on who looks: headers that a name splits, scripts in names, reports, cards and files.

Where each comes from: CWE-113 (CRLF in headers), CWE-601 (redirects elsewhere); CWE-79 for stored scripts, CVE-2023-6568
and CVE-2024-27133 of MLflow among them; CWE-434 and CWE-646 for files that are pages.
"""

from __future__ import annotations

import html.parser
import re
import time
from pathlib import Path
from urllib.parse import quote

import pytest
from attacked import Site, filled

from millrace.api.pages.rendering import markdown
from millrace.api.pages.routes import VIEWS
from millrace.control.card import render_card
from millrace.core.types import (
    Alert,
    Alias,
    ArtifactFile,
    DatasetVersion,
    Endpoint,
    Event,
    MetricPoint,
    Model,
    ModelVersion,
    Project,
    Run,
    RunLink,
    Step,
)

# --------------------------------------------------------------------------- headers of answers

SPLIT = [
    "a\r\nSet-Cookie: millrace=evil",
    "a\nLocation: https://evil.example",
    'a"; filename="b.html',
    "a\x00b",
    "ä\u2028b",
]


@pytest.mark.parametrize("name", SPLIT)
def test_no_name_splits_a_header(site: Site, name: str) -> None:
    """In Content-Disposition, Location, ETag and whatever else holds something of a request or a record."""
    client, run = site.client(site.tokens["owner"]), site.ids["mine"]
    blob = site.home.services.blobs.put(b"<script>1</script>")
    plain = name.replace("\r", "").replace("\n", "").replace("\x00", "")
    for path in {name, plain}:
        kept = ArtifactFile(id=f"{run}/{path}", owner=run, path=path, artifact=blob, project="mine")
        if "\x00" not in path:
            site.home.services.records.put(kept)
    urls = [
        filled(path, quote(name, safe=""))
        for method, path in site.routes()
        if method == "GET" and "/stream" not in path
    ]
    urls += [f"/runs/{run}/files/{quote(name)}", f"/api/2.0/mlflow-artifacts/artifacts/1/{run}/artifacts/{quote(name)}",
             f"/get-artifact?run_id={run}&path={quote(name)}", f"/login?next=/{quote(name)}",
             f"/?next={quote(name)}&q={quote(name)}"]  # fmt: skip
    for url in urls:
        for one in (client, site.client()):
            answer = one.get(url, headers={"Accept": "text/html"}, follow_redirects=False)
            for key, value in answer.headers.raw:
                assert not {10, 13, 0} & {*key, *value}, (url, key, value)
            assert "evil" not in answer.headers.get("set-cookie", ""), url
            assert not answer.headers.get("location", "/").lstrip("/").startswith(("https:", "evil")), url
            disposition = answer.headers.get("content-disposition", "attachment")
            assert disposition.startswith("attachment"), url
            assert disposition.count("filename=") <= 1, (url, disposition)


# --------------------------------------------------------------------------- stored scripts

EVIL = (
    """<script>alert("xss")</script>"><img src=x onerror=alert(1)>'><svg/onload=alert(1)></title></textarea>"""
    """<iframe srcdoc='<p>'>{{7*7}}${7*7}<!-- [x](javascript:alert(1)) ![y](z"onerror=alert(1)) `<b>` |<i>|"""
)
assert len(EVIL) < 240


class Reading(html.parser.HTMLParser):
    """A page as a browser parses it: what in it could run, and the text of it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.running: list[str] = []
        self.seen: list[str] = []
        self._inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        if tag in ("iframe", "object", "embed", "base", "foreignobject", "animate", "set", "textarea"):
            self.running.append(tag)
        for name, value in attrs:
            place = (value or "").strip().lower()
            if name.startswith("on") or name in ("srcdoc", "formaction"):
                self.running.append(f"{tag} {name}")
            if name == "style" and not re.fullmatch(r"[a-z-]+:\s*[-.,()%#\w\s]+(;[a-z-]+:\s*[-.,()%#\w\s]+)*;?", place):
                self.running.append(f"{tag} {name}={place[:40]}")
            scheme = re.match(r"[\s\x00-\x1f]*([a-z][a-z0-9+.\s-]*):", place)
            if (
                name in ("href", "src", "action")
                and scheme
                and not place.startswith(("data:image/", "http:", "https:"))
            ):
                self.running.append(f"{tag} {name}={place[:40]}")
            self.seen.append(value or "")

    def handle_data(self, data: str) -> None:
        if self._inside == "script" and "alert" in data:
            self.running.append(f"script {data[:40]}")
        self.seen.append(data)


@pytest.fixture(scope="module")
def evil(site: Site) -> dict[str, str]:
    """Everything of the site has a name that is a page of its own; names of what is there to be looked at."""
    services = site.home.services
    records, blob = services.records, services.blobs.put(EVIL.encode())
    tree = services.blobs.put_tree(_folder(services.home))
    run = Run(id="e" * 32, name=EVIL, project="evil", state="failed", created_by=EVIL, started_at=1.0, ended_at=2.0,
              created_at=time.time(), error={"code": EVIL, "message": EVIL, "hint": EVIL, "details": {EVIL: EVIL}},
              spec_text=f"project: x\n# {EVIL}\n", spec_path=f"/{EVIL}/millrace.yaml", tags={EVIL: EVIL})  # fmt: skip
    with records.transaction() as transaction:
        for record in (
            run, Project(id="77", project="evil", name=EVIL, created_at=1.0, tags={EVIL: EVIL}),
            Step(id="1", run_id=run.id, name=EVIL, stage="data", state="failed", reason=EVIL, facts={EVIL: EVIL, "warnings": [EVIL]},
                 outputs={EVIL: tree}, error=run.error, project="evil"),
            ArtifactFile(id=f"{run.id}/{EVIL}", owner=run.id, path=EVIL, artifact=blob, project="evil"),
            RunLink(id="2", run_id=run.id, direction="input", target="dataset", name=EVIL, digest=EVIL, project="evil"),
            ModelVersion(id="3", name=EVIL, number=1, bundle=tree, card=blob, description=EVIL, tags={EVIL: EVIL}, source=EVIL,
                         stage=EVIL, state_text=EVIL, created_by=EVIL, chosen_variant=EVIL, format="opaque", project="evil"),
            Model(id=EVIL, name=EVIL, description=EVIL, tags={EVIL: EVIL}, project="evil"),
            Alias(id=f"{EVIL}/{EVIL}", model=EVIL, name=EVIL, number=1, project="evil",
                  history=[{"from": None, "to": 1, "at": 1.0, "reason": EVIL}]),
            DatasetVersion(id="4", name=EVIL, number=1, artifact=tree, project="evil",
                           facts={"rows_kept": 1, "label": EVIL, "columns": [{"name": EVIL, "type": EVIL, "role": EVIL}]}),
            Endpoint(id=EVIL, name=EVIL, model=EVIL, number=1, variant=EVIL, text=EVIL, url=f"javascript:{EVIL}", project="evil"),
            Alert(id="5", endpoint=EVIL, model=EVIL, number=1, signal=EVIL, score=1.0, threshold=0.1, title=EVIL, created_at=1.0,
                  project="evil"),
        ):  # fmt: skip
            transaction.put(record)
        transaction.log(run.id, points=[MetricPoint(run.id, EVIL, 0, 0.5, 1.0)], params={EVIL: EVIL}, tags={EVIL: EVIL})
        transaction.append(Event(at=1.0, actor=EVIL, verb=EVIL, subject=EVIL, detail={EVIL: EVIL}))
    return {
        "run": run.id,
        "path": EVIL,
        "dataset": f"{EVIL}@1",
        "name": EVIL,
        "experiment": "77",
        "model": EVIL,
        "tab": "x",
    }


def _folder(home: Path) -> Path:
    folder = home / "scratch" / "evil"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EVIL.replace("/", "")[:200]).write_text(EVIL)
    return folder


def pages(evil: dict[str, str]) -> list[str]:
    """Every page, of the things whose names are hostile, and with queries that are."""

    def of(path: str) -> str:
        for name, value in evil.items():
            path = path.replace(f"{{{name}:path}}", quote(value, safe="")).replace(f"{{{name}}}", quote(value, safe=""))
        return path.replace("{number:int}", "1")

    queries = [
        f"?{name}={quote(EVIL)}"
        for name in ("q", "sort", "column", "state", "project", "runs", "subject", "before", "next", "problem")
    ]
    return [of(path) for path, _ in VIEWS] + [path + query for path in ("/", "/events", "/compare", "/login") for query in queries] + [
        f"/compare?runs={evil['run']},{evil['run'][:-1]}f", f"/runs?column={quote('params.' + EVIL)}", f"/events?subject=run:{evil['run']}",
    ]  # fmt: skip


def test_no_name_runs_on_any_page(site: Site, evil: dict[str, str]) -> None:
    client, seen = site.client(site.tokens["owner"]), 0
    for url in pages(evil):
        answer = client.get(url, headers={"Accept": "text/html"}, follow_redirects=False)
        assert answer.status_code < 500, (url, answer.text[:300])
        if not answer.headers.get("content-type", "").startswith("text/html"):
            assert answer.is_redirect or "attachment" in answer.headers["content-disposition"], url
            continue
        read = Reading(answer.text)
        assert read.running == [], url
        assert "49${" not in "".join(read.seen), "no template but ours is run"
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        seen += '<script>alert("xss")' in "".join(read.seen)
    assert seen >= 10, "it is there, as text"


def test_no_name_runs_in_a_report(site: Site, evil: dict[str, str]) -> None:
    """Written beside the spec to be opened as a file, where no header protects it."""
    answer = site.client(site.tokens["owner"]).get(f"/runs/{evil['run']}/report")
    if answer.status_code == 200:
        assert Reading(answer.text).running == []
        assert "sandbox" in answer.headers["content-security-policy"]
    card = render_card(
        {"data": {"label": EVIL, "files": [EVIL], "rows_kept": 1, "classes": {EVIL: 1}}, "register": {"model": EVIL}},
        EVIL,
    )
    assert "&lt;script>" in card, "it is there, as text"
    assert Reading(str(markdown(card))).running == []
    assert "<script" not in card


@pytest.mark.parametrize("name", ["page.html", "image.svg", "page.xhtml", "script.js", "feed.xml"])
def test_no_file_is_a_page_of_this_server(site: Site, name: str) -> None:
    """By every route that gives out what others have made."""
    run, text = site.ids["mine"], f"<html><script>alert('{name}')</script></html>"
    client = site.client(site.tokens["owner"])
    root = f"/api/2.0/mlflow-artifacts/artifacts/3/{run}/artifacts"
    assert client.request(
        "PUT", f"{root}/{name}", content=text.encode(), headers={"Content-Type": "text/html"}
    ).is_success
    digest = client.request("POST", "/api/v1/blobs", content=text.encode()).json()["digest"]
    for url in (
        f"{root}/{name}",
        f"/get-artifact?run_id={run}&path={name}",
        f"/runs/{run}/files/{name}",
        f"/api/v1/blobs/{digest}",
    ):
        answer = client.get(url)
        assert answer.text == text, url
        assert answer.headers["content-type"] == "application/octet-stream", url
        assert answer.headers["x-content-type-options"] == "nosniff", url
        assert answer.headers["content-security-policy"].startswith("sandbox"), url


def test_answers_in_json_are_no_pages(site: Site, evil: dict[str, str]) -> None:
    """Also errors, which repeat what was asked for."""
    client = site.client(site.tokens["owner"])
    for method, path in site.routes():
        if method != "GET" or "/stream" in path or path.startswith(("/runs/", "/static")):
            continue
        answer = client.get(
            filled(path, quote(EVIL, safe="")), headers={"Accept": "application/json"}, follow_redirects=False
        )
        kind = answer.headers.get("content-type", "")
        if not kind.startswith("text/html"):  # those are looked at above
            assert "<script" not in answer.text or kind.startswith(("application/", "text/event-stream")), (path, kind)
