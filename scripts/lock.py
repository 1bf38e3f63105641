"""Write `requirements-dev.lock`: the exact versions that the tests run with.

Walks from `millrace-ai[all,dev]` through what is installed here, so that nothing
else that happens to be in the environment enters. Local versions (`2.13.0+cpu`) lose their suffix: any
build of that release will do. Run it in an environment whose tests pass:

    .venv/bin/python scripts/lock.py
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements-dev.lock"
ROOT_EXTRAS = ("data", "torch", "sklearn", "postgres", "s3", "oidc", "sbom", "grpc", "dev")
HEADER = """\
# The versions that the tests run with: pip install -r requirements-dev.lock
# Made by scripts/lock.py from an environment whose tests passed; do not edit by hand.
"""


def wanted() -> list[Requirement]:
    """What pyproject.toml asks for, with all extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = list(project["project"]["dependencies"])
    for extra in ROOT_EXTRAS:
        lines.extend(project["project"]["optional-dependencies"][extra])
    return [Requirement(line) for line in lines]


def closure(requirements: list[Requirement]) -> dict[str, str]:
    """Installed name → version of everything the requirements need here.

    Raises:
        SystemExit: Something required is not installed, or has a version that is not allowed.
    """
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(requirement, "") for requirement in requirements]
    while queue:
        requirement, extra = queue.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{requirement} is not installed here") from None
        if not requirement.specifier.contains(installed.version, prereleases=True):
            raise SystemExit(f"want {requirement}, installed is {installed.version}")
        found[name] = installed.version.partition("+")[0]
        for wanted_extra in ("", *sorted(requirement.extras)):
            if (name, wanted_extra) not in seen:
                seen.add((name, wanted_extra))
                queue.extend((Requirement(line), wanted_extra) for line in installed.requires or [])
    return found


def main() -> int:
    """Write the lock file."""
    versions = closure(wanted())
    LOCK.write_text(HEADER + "".join(f"{name}=={versions[name]}\n" for name in sorted(versions)))
    print(f"{LOCK.name}: {len(versions)} distributions")
    return 0


if __name__ == "__main__":
    sys.exit(main())
