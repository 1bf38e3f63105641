"""Optional packages: found missing before any work starts, named with the extra to install."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from typing import Any

from millrace.core.errors import ExtraMissingError


def missing_modules(extras: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Which of (module, extra) cannot be imported; nothing is imported to find out.

    Example:
        >>> missing_modules([("json", "data"), ("no_such_module", "torch")])
        [('no_such_module', 'torch')]
    """
    return [(module, extra) for module, extra in extras if importlib.util.find_spec(module) is None]


def require(extras: Iterable[tuple[str, str]], purpose: str) -> None:
    """Refuse to start when a package is missing.

    Raises:
        ExtraMissingError: Names every missing package and the one command that installs them.

    Example:
        >>> require([("no_such_module", "torch")], "training model.py:build")
        Traceback (most recent call last):
        ...
        millrace.core.errors.ExtraMissingError: training model.py:build needs no_such_module, which is not installed
    """
    missing = missing_modules(extras)
    if missing:
        modules = ", ".join(sorted({module for module, _ in missing}))
        names = ",".join(sorted({extra for _, extra in missing}))
        raise ExtraMissingError(
            f"{purpose} needs {modules}, which is not installed", hint=f"pip install 'millrace-ai[{names}]'"
        )


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or "absent".

    Example:
        >>> version_of("no-such-distribution")
        'absent'
    """
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def load(target: str) -> Any:
    """The object named `package.module:attribute`; the one door for lazily imported implementations.

    Example:
        >>> load("json:dumps")([1])
        '[1]'
    """
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)
