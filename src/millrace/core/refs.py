"""Names of things: `model:vision/digits@champion`."""

from __future__ import annotations

import re
from typing import Literal, cast, get_args

import msgspec

from millrace.core.errors import InputError

RefKind = Literal["run", "step", "dataset", "model", "endpoint", "alert", "project", "event"]
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_REF = re.compile(rf"^(?:(?P<kind>[a-z]+):)?(?:(?P<project>{_NAME})/)?(?P<name>{_NAME})(?:@(?P<at>{_NAME}))?$")


class Ref(msgspec.Struct, frozen=True):
    """A reference: kind, optional project, name, and what it is `at` (a version number or an alias)."""

    kind: RefKind
    name: str
    project: str | None = None
    at: str | None = None

    @classmethod
    def parse(cls, text: str, kind: RefKind | None = None) -> Ref:
        """Parse `[kind:][project/]name[@version-or-alias]`.

        Args:
            text: The reference as typed.
            kind: Used when the text does not name one; a different one in the text is an error.

        Raises:
            InputError: The text is not a reference; the message shows the form.

        Example:
            >>> str(Ref.parse("vision/digits@3", kind="model"))
            'model:vision/digits@3'
        """
        match = _REF.match(text)
        if match is None:
            raise InputError(
                f"want a name such as digits, digits@champion or digits@3, got {text!r}",
                hint="letters, digits, '.', '_' and '-' are allowed in a name",
            )
        found = match["kind"] or kind
        if found not in get_args(RefKind) or (kind is not None and found != kind):
            raise InputError(f"want a reference to a {kind or 'known kind'}, got {text!r}")
        return cls(kind=cast(RefKind, found), name=match["name"], project=match["project"], at=match["at"])

    @property
    def number(self) -> int | None:
        """The version number when `at` is one (`3` or `v3`)."""
        digits = (self.at or "").removeprefix("v")
        return int(digits) if digits.isdigit() else None

    def __str__(self) -> str:
        project = f"{self.project}/" if self.project else ""
        at = f"@{self.at}" if self.at else ""
        return f"{self.kind}:{project}{self.name}{at}"
