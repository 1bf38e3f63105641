"""Known secret values in texts and plain data become `***`; also in streams, where a value may come in two parts."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import quote, quote_plus

SHOWN = "***"
SHORTEST = 4  # characters of a line of a value that is looked for: shorter ones stand in every text


class Redactor:
    """Knows some values and the forms in which they are usually written: as JSON, in a URL, as base64, line by line.

    Args:
        values: The secrets.

    Example:
        >>> hide = Redactor(["hunter2!"])
        >>> hide.text("password=hunter2%21"), hide.plain({"a": ["x hunter2!", 1]})
        ('password=***', {'a': ['x ***', 1]})
    """

    def __init__(self, values: Iterable[str]) -> None:
        needles = {form for value in values for form in _forms(value)}
        self._needles = sorted((one.encode() for one in needles), key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(one) for one in sorted(needles, key=len, reverse=True)))
        self._raw = re.compile(b"|".join(re.escape(one) for one in self._needles))

    def __bool__(self) -> bool:
        """Whether there is anything to hide."""
        return bool(self._needles)

    def text(self, text: str) -> str:
        """The text without them."""
        return self._pattern.sub(SHOWN, text) if self._needles else text

    def plain(self, value: Any) -> Any:
        """The same of plain data: of keys too, and of numbers that are one of them."""
        if not self._needles:
            return value
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.plain(key): self.plain(one) for key, one in value.items()}
        if isinstance(value, list | tuple):
            return [self.plain(one) for one in value]
        if isinstance(value, int | float) and not isinstance(value, bool) and self._pattern.fullmatch(str(value)):
            return SHOWN
        return value

    def stream(self) -> RedactedStream:
        """For bytes that come in parts."""
        return RedactedStream(self._needles, self._raw)


class RedactedStream:
    """Bytes in, bytes out; what may be the beginning of a secret is held back until more is known.

    Example:
        >>> stream = Redactor(["hunter2!"]).stream()
        >>> stream.feed(b"it is hunt"), stream.feed(b"er2! now hun"), stream.end()
        (b'it is ', b'*** now ', b'hun')
    """

    def __init__(self, needles: list[bytes], pattern: re.Pattern[bytes]) -> None:
        self._needles, self._pattern, self._held = needles, pattern, b""

    def feed(self, data: bytes) -> bytes:
        """What can be shown by now."""
        data = self._held + data
        if not self._needles:
            return data
        end = self._unsure(data)
        parts, at = [], 0
        for found in self._pattern.finditer(data):
            if found.start() >= end:
                break
            parts += [data[at : found.start()], SHOWN.encode()]
            at = found.end()
        end = max(end, at)
        self._held = data[end:]
        return b"".join([*parts, data[at:end]])

    def end(self) -> bytes:
        """The rest."""
        held, self._held = self._held, b""
        return self._pattern.sub(SHOWN.encode(), held) if self._needles else held

    def _unsure(self, data: bytes) -> int:
        """Where the longest end of the data begins that a secret begins with."""
        first = len(data)
        for needle in self._needles:
            at = data.find(needle[:1], max(0, len(data) - len(needle) + 1))
            while 0 <= at < first:
                if needle.startswith(data[at:]):
                    first = at
                    break
                at = data.find(needle[:1], at + 1)
        return first


def _forms(value: str) -> set[str]:
    lines = [line.strip() for line in value.splitlines()]
    whole = {value, value.strip(), *(line for line in lines if len(line) >= SHORTEST)}
    forms = set()
    for one in whole:
        encoded = base64.b64encode(one.encode()).decode()
        forms |= {
            one, repr(one)[1:-1], json.dumps(one)[1:-1], json.dumps(one, ensure_ascii=False)[1:-1], quote(one),
            quote(one, safe=""), quote_plus(one), encoded, encoded.rstrip("="),
        }  # fmt: skip
    return {form for form in forms if len(form) >= SHORTEST}
