"""The dossier in the web console: sealed off, whole, hostile names as text; the files to save are the same dossier."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest

from millrace.core.dossier import Dossier

PLACE = "/models/digits/versions/1/dossier"


class Tags(HTMLParser):
    """The elements of a page, and what is not closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.seen: set[str] = set()
        self.feed(html)
        self.wrong += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.wrong += [f"{tag} {name}" for name, _ in attrs if name.startswith("on") or name in ("style", "src")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"</{tag}>")


@pytest.fixture
def hostile(filled: Any) -> str:
    return f"/models/{quote(f'team/{filled.text}')}/versions/1/dossier"


def test_it_is_sealed_off_and_nothing_of_the_records_becomes_markup(
    web: httpx.Client, filled: Any, hostile: str
) -> None:
    for path in (PLACE, "/models/digits/versions/2/dossier", hostile):
        answer = web.get(path)
        assert answer.status_code == 200, answer.text[:500]
        assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none';")
        page = Tags(answer.text)
        assert page.wrong == []
        assert page.seen & {"script", "img", "iframe", "form", "link", "object"} == set()
    assert "&lt;script&gt;window.hacked" in web.get(PLACE).text  # a column's name
    assert web.get(hostile).text.count("&lt;script&gt;window.hacked") >= 3  # the title, the name, the description


def test_what_is_saved_is_the_same_dossier(web: httpx.Client, hostile: str) -> None:
    saved = web.get(PLACE, params={"save": "json"})
    assert saved.headers["content-type"] == "application/json"
    dossier = msgspec.json.decode(saved.content, type=Dossier)
    answer = web.get("/api/v1/models/digits@1/dossier", params={"html": "true"}).json()
    assert msgspec.convert(answer["dossier"], Dossier).data == dossier.data
    page = web.get(PLACE, params={"save": "html"})
    for one in (saved, page, web.get(hostile, params={"save": "html"})):
        assert one.headers["content-disposition"].startswith("attachment; filename*=UTF-8''")
        assert not re.search(r"[<>\"\r\n/]", one.headers["content-disposition"].split("''")[1])
        assert one.headers["content-security-policy"].startswith("sandbox;")
    assert page.text.split("Put together")[0] == answer["html"].split("Put together")[0]


def test_the_version_page_leads_there(web: httpx.Client) -> None:
    page = web.get("/models/digits/versions/1").text
    for query in ("", "?save=html", "?save=json"):
        assert f'href="{PLACE}{query}"' in page


@pytest.mark.parametrize(
    ("path", "status", "says"),
    [
        ("/models/digits/versions/9/dossier", 404, "has no version 9"),
        ("/models/nosuch/versions/1/dossier", 404, "has no version 1"),
        (f"{PLACE}?save=exe", 400, "is saved as html or json"),
    ],
)
def test_what_is_wrong_is_said_on_a_page(web: httpx.Client, path: str, status: int, says: str) -> None:
    answer = web.get(path)
    assert answer.status_code == status
    assert says in answer.text
