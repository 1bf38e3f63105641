"""A page to try a model out: fields from its signature, its answer as bars, and the equal command."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import orjson

from millrace.core.errors import NotFoundError
from millrace.formats.signature import TensorSpec
from millrace.serve.dataplane import DataPlane
from millrace.serve.forms import picture_of

HTML_TYPE = b"text/html; charset=utf-8"
HEADERS = (
    b"Content-Security-Policy: default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; "
    b"connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'\r\n"
    b"X-Content-Type-Options: nosniff\r\nReferrer-Policy: no-referrer\r\nVary: Accept\r\nCache-Control: no-store\r\n"
)
ASSET_HEADERS = b"X-Content-Type-Options: nosniff\r\nCache-Control: no-cache\r\n"
MAX_FIELDS = 200  # a row with more is one field of JSON
MAX_DRAWN = 64 * 64 * 3  # values of an example picture that are drawn
_FOLDER = Path(__file__).parents[1] / "static"
_TYPES = {".css": b"text/css", ".js": b"text/javascript", ".svg": b"image/svg+xml"}
ASSETS = {f"/static/{name}".encode(): name for name in ("style.css", "predict.js", "icon.svg")}


class Asset(NamedTuple):
    """A file that pages need."""

    media_type: bytes
    data: bytes


@functools.lru_cache(maxsize=len(ASSETS))
def asset(path: bytes) -> Asset:
    """The file of a path.

    Raises:
        NotFoundError: No page names it.
    """
    name = ASSETS.get(path)
    if name is None:
        raise NotFoundError(f"there is nothing at {path[:200].decode('utf-8', 'replace')}")
    return Asset(_TYPES[Path(name).suffix], (_FOLDER / name).read_bytes())


def wants_page(headers: Mapping[bytes, bytes]) -> bool:
    """Whether a browser asks, which wants something to look at.

    Example:
        >>> wants_page({b"accept": b"text/html,*/*;q=0.8"}), wants_page({b"accept": b"*/*"}), wants_page({})
        (True, False, False)
    """
    return b"text/html" in headers.get(b"accept", b"")


def list_page(names: Iterable[str]) -> str:
    """The models that are served, each with a link to its page.

    Example:
        >>> '<a href="/v1/models/a%20%3C">a &lt;</a>' in list_page(["a <"])
        True
    """
    rows = "".join(
        f'<tr><td class="name"><a href="/v1/models/{quote(name, safe="")}">{escape(name)}</a></td></tr>'
        for name in names
    )
    head = '<thead><tr><th scope="col">Model</th></tr></thead>'
    shown = f'<div class="card"><table>{head}<tbody>{rows}</tbody></table></div>'
    empty = '<div class="card empty"><b>No model is served</b><p>Deploy one, and it is here.</p></div>'
    return _document("Models", f'<div class="top"><h1>Models</h1></div>{shown if rows else empty}')


def model_page(plane: DataPlane) -> str:
    """The page of a model, filled with a row that it was tested with."""
    info, signature = plane.info, plane.signature
    path = f"/v1/models/{quote(info.name, safe='')}:predict"
    picture = picture_of(signature)
    fields = "".join(_fields(plane, spec) for spec in signature.inputs)
    upload = "" if picture is None else _upload(picture)
    answer = "its classes with their probabilities" if signature.task == "classification" else "a number"
    version = f'<span class="soft">v{escape(info.version)} · {escape(info.variant)}</span>'
    main = f"""<p class="crumb"><a href="/">Models</a></p>
<div class="top"><h1>{escape(info.name)}</h1>{version}</div>
<div class="two">
<form class="card try" data-url="{escape(path)}">
<header><h2>One row</h2><span class="push soft">{_count(plane)}</span></header>
<div class="body">{upload}<div class="fields">{fields}</div>
<p class="row"><button class="first">Predict</button></p></div></form>
<div>
<section class="card" aria-live="polite">
<header><h2>{escape(signature.label or "Answer")}</h2><span class="push soft" id="took"></span></header>
<div class="body" id="answer"><p class="note">The model answers with {answer}.</p></div></section>
<section class="card">
<header><h2>The same with curl</h2><button type="button" class="push" id="copy">Copy</button></header>
<div class="body"><pre id="command" tabindex="0" aria-label="The command"></pre></div></section>
</div></div>
<noscript><p class="card problem body">This page needs JavaScript; curl and every client work without.</p></noscript>"""
    return _document(info.name, main)


def _count(plane: DataPlane) -> str:
    columns = len(plane.signature.columns)
    return f"{columns} columns" if columns > 1 else "" if columns else f"{len(plane.signature.inputs)} inputs"


def _upload(spec: TensorSpec) -> str:
    height, width, channels = [*(spec.image or []), 1][:3]
    what = f"PNG or JPEG, {width} x {height} pixels, {'grey' if channels == 1 else 'colours'}"
    return f"""<label class="field"><span>Picture <span class="soft">{what}</span></span>
<input type="file" accept="image/png,image/jpeg" id="picture"></label>
<p class="row"><canvas id="drawn" width="{width}" height="{height}" data-channels="{channels}" role="img"
 aria-label="The picture that is sent"></canvas><span class="note">Without a picture of yours: a row that the model
was tested with.</span></p>"""


def _fields(plane: DataPlane, spec: TensorSpec) -> str:
    """One field per column, or one of JSON for a whole tensor."""
    row = _example(plane.examples, spec)
    if picture_of(plane.signature) is spec:
        drawn = row if len(row) <= MAX_DRAWN else []
        return f'<input type="hidden" data-tensor="{escape(spec.name)}" value="{escape(_json(drawn or row))}">'
    if not spec.columns or len(spec.columns) > MAX_FIELDS:
        shape = " x ".join("any" if size < 0 else str(size) for size in spec.shape[1:]) or "one value"
        name = escape(spec.name)
        return (
            f'<label class="field wide"><span>{name} <span class="soft">{shape}, JSON</span></span>'
            f'<textarea rows="6" spellcheck="false" data-tensor="{name}">{escape(_json(row))}</textarea></label>'
        )
    return "".join(
        _field(spec, column, value, _categories(plane.reference, column))
        for column, value in zip(spec.columns, [*row, *[None] * len(spec.columns)][: len(spec.columns)], strict=True)
    )


def _field(spec: TensorSpec, column: str, value: Any, known: list[str]) -> str:
    name = escape(column)
    if spec.dtype != "string":
        shown = "" if value is None else escape(f"{value:.9g}" if isinstance(value, float) else str(value))
        step = "any" if "float" in spec.dtype else "1"
        return (
            f'<label class="field"><span>{name}</span>'
            f'<input type="number" step="{step}" data-column="{name}" value="{shown}"></label>'
        )
    text = escape("" if value is None else str(value))
    if spec.semantic == "text":
        return (
            f'<label class="field wide"><span>{name}</span>'
            f'<textarea rows="3" data-column="{name}">{text}</textarea></label>'
        )
    options = "".join(f'<option value="{escape(one)}"></option>' for one in known)
    place = "known-" + quote(column, safe="")  # ids have no blanks
    listed = f' list="{place}"' if known else ""
    choices = f'<datalist id="{place}">{options}</datalist>' if known else ""
    return (
        f'<label class="field"><span>{name}</span>'
        f'<input type="text" data-column="{name}" value="{text}"{listed}></label>{choices}'
    )


def _categories(reference: Mapping[str, Any], column: str) -> list[str]:
    """The values of a column that the model has seen, from the profile."""
    features = reference.get("histograms", {}).get("layout", {}).get("inputs", [])
    return next((one.get("categories", []) for one in features if one.get("name") == column), [])


def _example(examples: Mapping[str, np.ndarray], spec: TensorSpec) -> list[Any]:
    """A row as JSON has it: missing numbers are null."""
    values = examples.get(spec.name)
    if values is None or not len(values):
        return []
    row = np.asarray(values[0]).reshape(-1).tolist()
    return [None if isinstance(value, float) and value != value else value for value in row]


def _json(value: Any) -> str:
    return orjson.dumps(value).decode()


def _document(title: str, main: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · Millrace</title><link rel="icon" href="/static/icon.svg">
<link rel="stylesheet" href="/static/style.css"><script src="/static/predict.js" defer></script></head>
<body><a class="skip" href="#main">Skip to content</a>
<header class="bar"><div><a class="brand" href="/">
<img src="/static/icon.svg" alt="" width="22" height="22">Millrace</a>
</div></header><main id="main">{main}</main></body></html>
"""
