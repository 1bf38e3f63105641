"""The size of an installation: the base, and the workbench without torch, by the files of their distributions."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator

BASE = "millrace-ai"
PACKAGE_AIMS = {"base": 270, "workbench without torch": 900}


def requirements(name: str, extras: set[str]) -> Iterator[str]:
    """Distributions that a distribution needs with these extras, for this platform."""
    for text in importlib.metadata.distribution(name).requires or []:
        need, _, marker = text.partition(";")
        wanted = re.findall(r"extra\s*==\s*['\"]([\w-]+)['\"]", marker)
        if wanted and not extras.intersection(wanted):
            continue
        is_windows = "win32" in marker and "!=" not in marker
        if is_windows or re.search(r"python_version\s*<\s*['\"]3\.1?[01]?['\"]", marker):
            continue
        yield re.split(r"[\s\[<>=!~(;]", need.strip())[0]


def closure(extras: set[str], without: set[str]) -> set[str]:
    """Every installed distribution that the extras bring."""
    found: set[str] = set()
    waiting = [*requirements(BASE, extras)]
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found or name in without or name == BASE:
            continue
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        waiting.extend(requirements(name, set()))
    return found


def size_mb(names: set[str]) -> float:
    """Megabytes on disk, byte-code included."""
    total = 0
    for name in names:
        for file in importlib.metadata.distribution(name).files or []:
            path = file.locate()
            total += path.stat().st_size if path.is_file() else 0  # type: ignore[union-attr]
    return total / 1e6


def main() -> None:
    """Print one table."""
    sets = {
        "base": closure(set(), set()),
        "workbench without torch": closure({"data", "sklearn", "torch"}, {"torch", "onnxscript"}),
    }
    print(f"{'what':<26}{'distributions':>14}{'MB':>8}{'aim MB':>8}")
    for label, names in sets.items():
        print(f"{label:<26}{len(names):>14}{size_mb(names):>8.0f}{PACKAGE_AIMS[label]:>8}")


if __name__ == "__main__":
    main()
