"""Names that were perhaps meant."""

from __future__ import annotations

import difflib


def did_you_mean(name: str, known: list[str], what: str = "columns") -> str:
    """A hint with the nearest known names, or all of them when none is near.

    Example:
        >>> did_you_mean("churnd", ["age", "churned"])
        "did you mean 'churned'? columns: age, churned"
    """
    folded = {other.casefold(): other for other in known}
    near = [folded[match] for match in difflib.get_close_matches(name.casefold(), list(folded), n=1, cutoff=0.6)]
    shown = ", ".join(one if len(one) <= 60 else one[:59] + "…" for one in known[:20])
    shown += f" and {len(known) - 20} more" if len(known) > 20 else ""
    return (f"did you mean {short(near[0])}? " if near else "") + f"{what}: {shown}"


def short(value: object, limit: int = 60) -> str:
    """A value for a message: its repr, cut where it is long.

    Example:
        >>> short("x" * 100, 10)
        "'xxxxxxxx…"
    """
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
