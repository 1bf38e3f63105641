"""The SBOM of a run: what its steps ran with, as a document that CycloneDX's own schema accepts."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.control.dispatch import Dispatcher
from millrace.control.garbage import collect
from millrace.core.environment import ENVIRONMENT_MEDIA_TYPE, Environment, current_environment
from millrace.core.errors import ExtraMissingError, NotFoundError
from millrace.core.ids import canonical_json
from millrace.core.types import Run, Step
from millrace.wiring import open_dispatcher, open_transport

SPEC = "project: notes\nsteps:\n  - {name: first, uses: steps.py:work}\n  - {name: second, uses: steps.py:work, needs: [first]}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sbom")
    (place / "millrace.yaml").write_text(SPEC)
    (place / "steps.py").write_text("def work(ctx):\n    return {'seed': ctx.seed}\n")
    return place


@pytest.fixture(scope="module")
def home(folder: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(folder / "home"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def runs(home: Dispatcher, folder: Path) -> list[Run]:
    """The second one finds every step done already."""
    found = []
    for _ in range(2):
        run = home.call("run.submit", {"spec_path": str(folder / "millrace.yaml")}).run
        list(home.stream("run.drive", {"run": run.id}))
        found.append(run)
    return found


def complain(document: dict[str, Any]) -> Any:
    """What the official schema of CycloneDX 1.6 objects to; None is nothing."""
    return JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(document))


def test_the_schema_accepts_it_and_would_not_accept_anything(home: Dispatcher, runs: list[Run]) -> None:
    document = home.call("run.sbom", {"run": runs[0].id})
    assert complain(document) is None
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.6")
    assert complain({**document, "serialNumber": "1"}) is not None


def test_it_lists_what_is_installed(home: Dispatcher, runs: list[Run]) -> None:
    document = home.call("run.sbom", {"run": runs[0].id})
    listed = {one["name"]: one["version"] for one in document["components"] if one["type"] == "library"}
    installed = {
        re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version for one in importlib.metadata.distributions()
    }
    assert listed == installed
    numpy = next(one for one in document["components"] if one["name"] == "numpy")
    assert numpy["purl"] == f"pkg:pypi/numpy@{importlib.metadata.version('numpy')}"
    platform = next(one for one in document["components"] if one["type"] == "platform")
    assert platform["version"] == ".".join(map(str, sys.version_info[:3]))
    about = document["metadata"]["component"]
    assert (about["name"], about["version"]) == ("notes", runs[0].id)
    needs = next(one for one in document["dependencies"] if one["ref"] == about["bom-ref"])
    assert len(needs["dependsOn"]) == len(document["components"])


def test_the_same_run_has_the_same_document_and_a_run_taken_from_it_the_same_packages(
    home: Dispatcher, runs: list[Run]
) -> None:
    first, again, later = (home.call("run.sbom", {"run": run.id}) for run in (runs[0], runs[0], runs[1]))
    assert first == again
    assert first["components"] == later["components"]
    assert first["serialNumber"] != later["serialNumber"]
    steps = home.services.records.find(Step, {"run_id": runs[1].id})
    assert [step.state for step in steps] == ["cached", "cached"]


def test_equal_environments_are_stored_once_and_outlive_garbage(home: Dispatcher, runs: list[Run]) -> None:
    steps = [step for run in runs for step in home.services.records.find(Step, {"run_id": run.id})]
    (digest,) = {step.environment.digest for step in steps if step.environment}
    assert len(steps) == 4
    collect(home.services, apply=True, now=True)
    kept = msgspec.json.decode(home.services.blobs.read(digest), type=Environment)
    assert kept.packages == current_environment().packages
    assert all(
        step.environment.digest not in {one.digest for one in step.outputs.values()}
        for step in steps
        if step.environment
    )


def test_steps_of_different_machines_say_which_had_what(home: Dispatcher, runs: list[Run]) -> None:
    """A remote worker has another numpy: both are listed, each with its steps."""
    run = Run(id="two-machines", name="two", state="succeeded", created_at=1.0)
    home.services.records.put(run)
    for number, version in enumerate(("1.0", "2.0")):
        packages = {"numpy": version, "shared": "3"}
        one = msgspec.structs.replace(current_environment([]), packages=packages)
        stored = home.services.blobs.put(canonical_json(one), ENVIRONMENT_MEDIA_TYPE)
        home.services.records.put(
            Step(id=f"s{number}", run_id=run.id, name=f"step{number}", stage="user", environment=stored)
        )
    document = home.call("run.sbom", {"run": run.id})
    assert complain(document) is None
    found = {
        (one["name"], one["version"]): one.get("properties")
        for one in document["components"]
        if one["type"] == "library"
    }
    assert set(found) == {("numpy", "1.0"), ("numpy", "2.0"), ("shared", "3")}
    assert found["shared", "3"] is None
    assert found["numpy", "2.0"] == [{"name": "millrace:steps", "value": "step1"}]


def test_a_run_without_a_record_says_so(home: Dispatcher, runs: list[Run]) -> None:
    home.services.records.put(Run(id="tracked", name="tracked", state="succeeded"))
    with pytest.raises(NotFoundError, match="has no record of its environment"):
        home.call("run.sbom", {"run": "tracked"})


def test_the_command_writes_a_file(home: Dispatcher, runs: list[Run], folder: Path) -> None:
    assert runs

    def invoke(*words: str) -> Any:
        return CliRunner().invoke(cli, [*words], obj=Session(open_transport))

    target = folder / "deep" / "sbom.cdx.json"
    done = invoke("--home", str(folder / "home"), "runs", "sbom", runs[0].id, "--to", str(target))
    assert (done.exit_code, done.output.strip()) == (0, str(target))
    assert complain(json.loads(target.read_text())) is None
    shown = invoke("--home", str(folder / "home"), "runs", "sbom", runs[0].id, "--json")
    assert json.loads(shown.output) == json.loads(target.read_text())
    refused = invoke("--home", str(folder / "home"), "runs", "sbom", runs[0].id, "--to", str(folder))
    assert refused.exit_code == 2
    assert "cannot be written" in refused.output


def test_names_are_read_as_they_are_installed(tmp_path: Path) -> None:
    """The first of a name wins, as for imports; what is no package is left out."""
    for place, entry in [
        ("a", "Two_Words-1.0.dist-info"),
        ("b", "two.words-2.0.dist-info"),
        ("b", "x-1.dist-info"),
        ("b", "x"),
    ]:
        (tmp_path / place / entry).mkdir(parents=True)
    found = current_environment([str(tmp_path / "a"), str(tmp_path / "none"), str(tmp_path / "b")])
    assert found.packages == {"two-words": "1.0", "x": "1"}


def test_without_the_extra_the_error_names_it(
    home: Dispatcher, runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cyclonedx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExtraMissingError, match="needs cyclonedx") as missing:
        home.call("run.sbom", {"run": runs[0].id})
    assert missing.value.hint == "pip install 'millrace-ai[sbom]'"
