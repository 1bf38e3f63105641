"""What a terminal is shown of texts of others: names, logs, errors. Nothing of them steers it (CWE-150)."""

from __future__ import annotations

import sys
from typing import Any, TextIO

from millrace.core.visible import visible


class VisibleText:
    """A terminal as a stream of texts; control characters are shown instead of obeyed.

    Args:
        stream: The terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        """Show a text."""
        return self.stream.write(visible(text))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the terminal's."""
        return getattr(self.stream, name)


def guard_terminal() -> None:
    """From now on, texts that are printed to a terminal do not steer it; files and pipes get them as they are."""
    if sys.stdout.isatty():
        sys.stdout = VisibleText(sys.stdout)  # type: ignore[assignment]
    if sys.stderr.isatty():
        sys.stderr = VisibleText(sys.stderr)  # type: ignore[assignment]


def plain_stdout() -> TextIO:
    """Stdout for what has made its texts visible itself, and may steer the terminal."""
    return sys.stdout.stream if isinstance(sys.stdout, VisibleText) else sys.stdout
