"""The dossier as one self-contained page: no script, nothing loaded, everything from outside escaped."""

from __future__ import annotations

import time
from pathlib import Path

import jinja2

from millrace.core.dossier import NOT_RECORDED, Dossier
from millrace.core.units import format_duration, format_size


def render_dossier(dossier: Dossier) -> str:
    """HTML of a dossier: prints well, follows the reader's light or dark scheme."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "report_templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(size=format_size, duration=format_duration, stamp=stamp, figure=figure)
    first = {part: heading.point for heading in reversed(dossier.headings) for part in heading.parts}
    return environment.get_template("dossier.html").render(d=dossier, first=first, not_recorded=NOT_RECORDED)


def stamp(at: float | None) -> str:
    """A time in UTC.

    Example:
        >>> stamp(0.0), stamp(None)
        ('1970-01-01 00:00 UTC', '')
    """
    return "" if at is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(min(max(at, 0.0), 253402300799.0)))


def figure(value: float | None) -> str:
    """A number with five significant digits.

    Example:
        >>> figure(0.98765432), figure(None)
        ('0.98765', '')
    """
    return "" if value is None else f"{value:.5g}"
