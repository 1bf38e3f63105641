"""Templates to HTML: everything from outside is escaped; numbers and times as people read them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
import msgspec
from markdown_it import MarkdownIt
from markupsafe import Markup
from starlette.responses import HTMLResponse, Response

from millrace.api.pages.assets import Assets
from millrace.api.problems import RETRY_AFTER_S, status_of
from millrace.api.sessions import current_session
from millrace.control.authorisation import acting_principal
from millrace.core.clock import Clock
from millrace.core.errors import MillraceError
from millrace.core.types import Struct
from millrace.core.units import format_duration, format_size

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'self'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cache-Control": "no-cache, private",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}

_MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")
_HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")


class Page(Struct, frozen=True, kw_only=True):
    """What a template shows. `section` is the entry of the menu that it belongs to."""

    template: str
    section: str
    title: str
    context: dict[str, Any] = {}


class Renderer:
    """Makes responses of pages.

    Args:
        assets: Scripts and styles.
        clock: For "3 min ago".
        home: Shown in the foot of every page, to whoever runs the server.
    """

    def __init__(self, assets: Assets, clock: Clock, home: str) -> None:
        loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
        self._environment = jinja2.Environment(
            loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
            auto_reload=False,
        )  # fmt: skip
        self._clock = clock
        self._environment.globals.update(
            asset=assets.url,
            home=lambda: "" if acting_principal() else home,
            with_query=with_query,
            session=current_session,
        )
        self._environment.filters.update(
            number=number, share=share, size=format_size, duration=duration, iso=iso, stamp=stamp, segment=segment,
            short=short, text=text, markdown=markdown,
            ago=lambda at: ago(at, clock.now()),
        )  # fmt: skip

    def page(self, page: Page) -> Response:
        """The page."""
        return HTMLResponse(self._html(page), headers=HEADERS)

    def problem(self, error: MillraceError) -> Response:
        """What went wrong, as a page with the status of the error."""
        status = status_of(error)
        context = {"error": error, "status": status}
        headers = {**HEADERS, "Retry-After": str(RETRY_AFTER_S)} if status in (429, 503) else HEADERS
        page = Page(template="problem.html", section="", title="Problem", context=context)
        return HTMLResponse(self._html(page), status_code=status, headers=headers)

    def _html(self, page: Page) -> str:
        template = self._environment.get_template(page.template)
        return template.render(**page.context, section=page.section, title=page.title, now=self._clock.now())


def number(value: float | None) -> str:
    """A number for people, four or five significant digits; the exact one belongs into a title.

    Example:
        >>> number(0.9933333), number(31200.5), number(7), number(1e-7), number(float("nan")), number(None)
        ('0.9933', '31,200', '7', '1e-07', 'NaN', '')
    """
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def share(value: float | None) -> str:
    """A share of one in per cent.

    Example:
        >>> share(0.9933), share(0.5), share(None)
        ('99.3 %', '50 %', '')
    """
    return "" if value is None else f"{value * 100:.1f}".removesuffix(".0") + " %"


def duration(value: float | None) -> str:
    """A time span; nothing when it is not known or makes no sense.

    Example:
        >>> duration(3.21), duration(None), duration(-1.0), duration(4000.0)
        ('3.2 s', '', '', '1 h 6 min')
    """
    if value is None or value < 0 or not math.isfinite(value):
        return ""
    if value < 3600:
        return format_duration(value).replace("us", " µs").replace("ms", " ms")
    hours = int(value // 3600)
    return f"{hours} h {int(value % 3600 // 60)} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def iso(at: float | None) -> str:
    """A time for machines, in UTC.

    Example:
        >>> iso(0.0)
        '1970-01-01T00:00:00Z'
    """
    return "" if at is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", _utc(at))


def stamp(at: float | None) -> str:
    """A time for people, in UTC.

    Example:
        >>> stamp(0.0)
        '1970-01-01 00:00:00 UTC'
    """
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M:%S UTC", _utc(at))


def ago(at: float, now: float) -> str:
    """How long ago something was; the date when it is longer than a week.

    Example:
        >>> ago(1000.0, 1003.0), ago(1000.0, 1190.0), ago(0.0, 9e5)
        ('3 s ago', '3 min ago', '1 Jan 1970')
    """
    passed = max(now - at, 0.0)
    for limit, unit, name in ((60, 1, "s"), (3600, 60, "min"), (86400, 3600, "h"), (7 * 86400, 86400, "d")):
        if passed < limit:
            return f"{int(passed // unit)} {name} ago"
    return time.strftime("%d %b %Y", _utc(at)).removeprefix("0")


def _utc(at: float) -> time.struct_time:
    return time.gmtime(min(max(at, 0.0), 253402300799.0))  # until the year 9999


def segment(text: str) -> str:
    """A name as a part of a path.

    Example:
        >>> segment("a b/c?")
        'a%20b/c%3F'
    """
    return quote(text, safe="/@")


def short(digest: str) -> str:
    """The beginning of a digest or id.

    Example:
        >>> short("sha256:0123456789abcdef"), short("06611e8a30a7db15")
        ('01234567', '06611e8a')
    """
    return digest.removeprefix("sha256:")[:8]


def text(value: Any) -> str:
    """Any plain value in one line.

    Example:
        >>> text("a"), text({"b": [1, None]}), text(True)
        ('a', '{"b":[1,null]}', 'true')
    """
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()


def markdown(source: str) -> Markup:
    """Markdown of others as HTML: no raw HTML, no scripts in links, no styles; headings below those of the page.

    Example:
        >>> str(markdown("# A <b> [x](javascript:alert)")).strip()
        '<h3>A &lt;b&gt; [x](javascript:alert)</h3>'
    """
    tokens = _MARKDOWN.parse(source)
    for token in tokens:
        token.attrs.pop("style", None)  # of aligned columns; the policy forbids it
        if token.tag in _HEADINGS:
            token.tag = f"h{min(_HEADINGS.index(token.tag) + 3, 6)}"
    return Markup(_MARKDOWN.renderer.render(tokens, _MARKDOWN.options, {}))


def with_query(path: str, pairs: Mapping[str, Any] | list[tuple[str, str]]) -> str:
    """A path with a query; empty values are left out, lists repeat their name.

    Example:
        >>> with_query("/runs", {"q": "a b", "state": "", "column": ["x", "y"]})
        '/runs?q=a+b&column=x&column=y'
    """
    items = pairs.items() if isinstance(pairs, Mapping) else pairs
    kept = [(name, value) for name, value in items if value not in ("", None, [], ())]
    return f"{path}?{urlencode(kept, doseq=True)}" if kept else path
