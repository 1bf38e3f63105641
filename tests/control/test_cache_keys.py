"""What enters a key of installed packages: those that a stage names, no other."""

from __future__ import annotations

from pathlib import Path

import pytest

from millrace.control.planning import KeyMaker, explain, plan_steps
from millrace.core import extras
from millrace.core.spec_errors import parse_spec
from millrace.core.types import Artifact
from millrace.wiring import STAGES


def keys(folder: Path) -> dict[str, dict[str, str]]:
    """The parts of every step's key."""
    spec = parse_spec("data: {source: a.csv, label: y}\n")
    maker = KeyMaker(spec, folder, STAGES)
    artifact = Artifact(digest="sha256:1", size_bytes=1)
    return {plan.name: maker.parts(plan, dict.fromkeys(plan.inputs, artifact)) for plan in plan_steps(spec, STAGES)}


@pytest.mark.parametrize(("package", "reruns"), [("scikit-learn", {"train"}), ("a-package-of-another-project", set())])
def test_another_version_reruns_the_steps_that_use_it_only(
    package: str, reruns: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n")
    before, known = keys(tmp_path), extras.version_of
    monkeypatch.setattr(extras, "version_of", lambda name: "99" if name == package else known(name))
    after = keys(tmp_path)
    changed = {name for name in before if before[name] != after[name]}
    assert changed >= reruns
    assert changed == {name for name, stage in STAGES.items() if package in stage.distributions}
    for name in changed:
        assert package in explain(before[name], after[name])
