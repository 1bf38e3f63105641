"""What is shipped: names, licence, extras, lock file."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import entry_points, metadata, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import millrace

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = dict(
    line.split("==")
    for line in (ROOT / "requirements-dev.lock").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)
EXTRAS = ("data", "torch", "sklearn", "postgres", "s3", "oidc", "sbom", "dev")


def requirements(*extras: str) -> list[Requirement]:
    """The requirements of the base package (no argument) or of extras."""
    lines = PROJECT["dependencies"] if not extras else []
    for extra in extras:
        lines = lines + PROJECT["optional-dependencies"][extra]
    return [Requirement(line) for line in lines]


def test_names_and_licence() -> None:
    assert (PROJECT["name"], PROJECT["license"], PROJECT["requires-python"]) == ("millrace-ai", "Apache-2.0", ">=3.11")
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert metadata("millrace-ai")["Name"] == "millrace-ai"
    assert millrace.__version__ == version("millrace-ai") == PROJECT["version"]
    (command,) = [one for one in entry_points(group="console_scripts") if one.name == "millrace"]
    assert command.value == "millrace.__main__:main"


def test_the_base_is_light() -> None:
    base = {canonicalize_name(one.name) for one in requirements()}
    assert len(base) <= 23
    assert base & {"torch", "polars", "scipy", "pyarrow", "scikit-learn", "lightgbm", "onnx"} == set()


def test_all_is_the_workbench() -> None:
    (workbench,) = PROJECT["optional-dependencies"]["all"]
    assert Requirement(workbench).extras == {"data", "torch", "sklearn", "postgres", "s3", "oidc", "sbom", "grpc"}


@pytest.mark.parametrize("requirement", [*requirements(), *requirements(*EXTRAS)], ids=str)
def test_the_lock_covers(requirement: Requirement) -> None:
    locked = LOCK.get(canonicalize_name(requirement.name))
    assert locked is not None, f"{requirement.name} is not in requirements-dev.lock: make lock"
    assert requirement.specifier.contains(locked, prereleases=True)


def test_the_lock_is_plain() -> None:
    assert LOCK["torch"] == re.match(r"[\d.]+", LOCK["torch"])[0]  # type: ignore[index]
    assert [name for name, locked in LOCK.items() if not re.fullmatch(r"[\w.!]+", locked)] == []
    assert "matplotlib" not in LOCK


def test_ports_say_why_each_optional_package_is_there() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    block = text.split("\ndependencies = [", 1)[1].split("]\n", 1)[0]
    bare = [line.strip() for line in block.splitlines() if line.strip() and "#" not in line]
    assert bare == []
