"""A context without a store, and data sections from plain dictionaries."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millrace.core.spec import Data, Spec
from millrace.core.types import Artifact
from millrace.core.units import Share
from millrace.data.prepare import prepare
from millrace.formats.dataset import DatasetReader, open_dataset

TEST_DATA = Path(os.environ.get("MILLRACE_TEST_DATA", Path(__file__).parents[3] / "shared" / "data"))


class FolderContext:
    """Everything a stage may touch, on plain folders: outputs are copied beside the scratch folder."""

    def __init__(self, project_dir: Path, work_dir: Path) -> None:
        self.project_dir = project_dir
        self.scratch = work_dir / "scratch"
        self.checkpoints = work_dir / "checkpoints"
        self.outputs: dict[str, Path] = {}
        self.seed, self.threads, self.device = 0, 1, "cpu"
        self.params: dict[str, Any] = {}
        self.cancelled = False
        self.lines: list[str] = []
        self._stored = work_dir / "stored"
        for folder in (self.scratch, self.checkpoints, self._stored):
            folder.mkdir(parents=True, exist_ok=True)

    def input(self, name: str) -> Path:
        return self.outputs[name]

    def has_input(self, name: str) -> bool:
        return name in self.outputs

    def output(self, name: str, path: Path) -> Artifact:
        target = self._stored / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(path, target)
        self.outputs[name] = target
        return Artifact(digest=tree_digest(target), size_bytes=1)

    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        self.lines.append(f"{name}={value}@{step}")

    def progress(self, done: float, total: float, text: str = "") -> None:
        self.lines.append(text)


def tree_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\n".encode() + path.read_bytes())
    return digest.hexdigest()


def data_section(values: dict[str, Any]) -> Data:
    def decode(kind: type, value: Any) -> Any:
        assert kind is Share
        return Share.parse(value)

    rules = [rule if isinstance(rule, dict) else {rule: {}} for rule in values.get("clean", [])]
    return msgspec.convert({**values, "clean": rules}, type=Data, dec_hook=decode)


class Project:
    """A folder with data files in which the data step can be run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def run(self, **section: Any) -> tuple[dict[str, Any], DatasetReader]:
        return self.run_spec(Spec(data=data_section({"source": "t.csv", "label": "y", **section})))

    def run_spec(self, spec: Spec) -> tuple[dict[str, Any], DatasetReader]:
        self.count += 1
        context = FolderContext(self.folder, self.folder / f".work{self.count}")
        facts = prepare(spec, context)
        assert facts["rows_in"] == facts["rows_kept"] + facts["rejected"]
        assert facts["rejected"] == sum(facts["rejected_by_reason"].values())
        assert facts["rows_kept"] == sum(facts["split"].values())
        return facts, open_dataset(context.outputs["dataset"])


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture(scope="session")
def test_data() -> Path:
    if not TEST_DATA.is_dir():
        pytest.skip(f"no test data in {TEST_DATA}")
    return TEST_DATA
