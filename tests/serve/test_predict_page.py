"""The page to try a model out: made from its signature, safe with any name, and right in a real browser."""

from __future__ import annotations

import http.client
import io
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.dataplane import DataPlane, ModelInfo
from millrace.serve.page import list_page, model_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(__file__).parents[1] / "api" / "pages" / "vendor" / "axe.min.js"
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
HOSTILE = '"><script>window.hacked=1</script>'


def get(live: Any, path: str, headers: dict[str, str] = BROWSER) -> tuple[int, http.client.HTTPMessage, str]:
    connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=20)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    return response.status, response.headers, text


def test_a_table_has_typed_fields_with_a_real_row(table: Any) -> None:
    status, headers, text = get(table, "/v1/models/prices/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert re.search(r'<input type="number" step="any" data-column="age" value="[0-9.]+">', text)
    assert 'data-column="plan"' in text
    assert '<datalist id="known-plan"><option value="a"></option><option value="b"></option>' in text
    assert 'data-url="/v1/models/prices:predict"' in text


def test_a_picture_is_uploaded_and_an_example_is_there(digits: Any) -> None:
    _, _, text = get(digits, "/v1/models/digits")
    assert '<input type="file" accept="image/png,image/jpeg" id="picture">' in text
    assert "PNG or JPEG, 8 x 8 pixels, grey" in text
    found = re.search(r'data-tensor="pixels" value="(\[[^"]*\])"', text)
    assert found is not None
    assert len(json.loads(found[1])) == 64


def test_programs_get_the_document_as_before(digits: Any) -> None:
    for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
        status, headers, text = get(digits, "/v1/models/digits", accept)
        assert (status, headers["Content-Type"], json.loads(text)["ready"]) == (200, "application/json", True)


def test_nothing_inline_and_nothing_from_elsewhere(digits: Any) -> None:
    for path in ("/", "/v1/models/digits/"):
        _, headers, text = get(digits, path)
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert not re.search(r"<script(?! src=)|<style|style=| on[a-z]+=|https?://", text)
        for asset in re.findall(r'(?:src|href)="(/static/[^"]+)"', text):
            status, headers, _ = get(digits, asset)
            assert (status, headers["X-Content-Type-Options"]) == (200, "nosniff")
    assert get(digits, "/static/../pyproject.toml")[0] == 404
    assert get(digits, "/static/live.js")[0] == 404


def test_names_of_others_are_text() -> None:
    spec = TensorSpec(name=HOSTILE, dtype="string", shape=[-1, 1], semantic="category", columns=[HOSTILE])
    signature = Signature(task="regression", inputs=[spec], outputs=[], label=HOSTILE)
    reference = {"histograms": {"layout": {"inputs": [{"name": HOSTILE, "categories": [HOSTILE]}]}}}
    info = ModelInfo(name=HOSTILE, version=HOSTILE, variant=HOSTILE)
    examples = {HOSTILE: np.array([[HOSTILE]], dtype=object)}
    plane = SimpleNamespace(info=info, signature=signature, examples=examples, reference=reference)
    for text in (model_page(cast(DataPlane, plane)), list_page([HOSTILE])):
        assert "<script>" not in text
        assert "&lt;script&gt;" in text


def test_what_has_no_columns_is_a_field_of_json() -> None:
    spec = TensorSpec(name="x", dtype="float32", shape=[-1, 3])
    signature = Signature(task="regression", inputs=[spec], outputs=[], label="y")
    plane = SimpleNamespace(
        info=ModelInfo(name="m", version="1", variant="fp32"), signature=signature, reference={},
        examples={"x": np.array([[1, np.nan, 2]], np.float32)},
    )  # fmt: skip
    assert ">[1.0,null,2.0]</textarea>" in model_page(cast(DataPlane, plane))


# ---------------------------------------------------------------------- in a browser

Open = Callable[..., Any]
in_browser = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here"),
]


@pytest.fixture(scope="module")
def visit() -> Iterator[Open]:
    """Opens a page; at the end the console must have been silent."""
    api = pytest.importorskip("playwright.sync_api")
    said: list[str] = []
    with api.sync_playwright() as play:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = play.chromium.launch(executable_path=CHROMIUM, args=arguments)

        def go(live: Any, path: str, *, width: int = 1280, scheme: str = "light", bypass_csp: bool = False) -> Any:
            context = browser.new_context(
                color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=bypass_csp
            )
            page = context.new_page()
            page.on("console", lambda one: said.append(one.text) if one.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(f"http://127.0.0.1:{live.port}{path}")
            return page

        yield go
        browser.close()
    said = [text for text in said if "400 (Bad Request)" not in text]  # asked for below
    assert said == []


def until(page: Any, expression: str) -> None:
    deadline = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        time.sleep(0.05)


class TestInABrowser:
    """One browser for all."""

    pytestmark = in_browser

    def test_a_row_is_predicted_and_the_command_is_the_same(self, visit: Open, table: Any) -> None:
        page = visit(table, "/")
        page.click("text=prices")
        page.fill("[data-column=age]", "1")
        page.fill("[data-column=income]", "")
        page.fill("[data-column=plan]", "a")
        page.click("text=Predict")
        until(page, "document.querySelector('.result')?.textContent === '11'")
        command = page.inner_text("#command")
        assert f"curl 'http://127.0.0.1:{table.port}/v1/models/prices:predict'" in command
        body = re.search(r"-d '(.*)'", command)
        assert body is not None
        assert table.call("POST", "/v1/models/prices:predict", body[1].encode()) == (
            200,
            {"predictions": [{"value": 11.0}]},
        )

    def test_a_picture_is_predicted_and_a_wrong_one_is_explained(
        self, visit: Open, digits: Any, tmp_path: Path
    ) -> None:
        page = visit(digits, "/v1/models/digits/", width=400)
        page.click("text=Predict")
        until(page, "document.querySelectorAll('#answer tr').length === 10")
        for size, shown in ((8, ".result"), (9, "[role=alert]")):
            out = io.BytesIO()
            Image.new("L", (size, size), 128).save(out, "PNG")
            (tmp_path / f"it's {size}.png").write_bytes(out.getvalue())
            page.set_input_files("#picture", tmp_path / f"it's {size}.png")
            page.click("text=Predict")
            until(page, f"document.querySelector('{shown}') !== null")
        assert page.inner_text("[role=alert]") == "want a picture of 8 x 8 pixels, got 9 x 9: resize it first"
        assert "--data-binary @'it'\\''s 9.png'" in page.inner_text("#command")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_axe_finds_nothing_serious(self, visit: Open, digits: Any, table: Any, scheme: str) -> None:
        for live, path in ((digits, "/v1/models/digits/"), (table, "/v1/models/prices/"), (table, "/")):
            page = visit(live, path, scheme=scheme, bypass_csp=True, width=400)
            if path != "/":
                page.click("text=Predict")
                until(page, "document.querySelector('.result') !== null")
            page.add_script_tag(path=AXE)
            found = page.evaluate("axe.run(document, {})")["violations"]
            bad = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
            assert bad == []
            assert page.evaluate("document.documentElement.scrollWidth") <= 400
