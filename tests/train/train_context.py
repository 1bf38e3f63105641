"""A context for stages in plain folders. Light: the resume test's own processes import it too."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec

from millrace.core.errors import NotFoundError
from millrace.core.ids import digest_bytes
from millrace.core.spec import Spec
from millrace.core.types import Artifact
from millrace.core.units import Share


class FakeContext:
    """Everything a stage may touch, in plain folders; outputs of one step are inputs of the next."""

    def __init__(self, folder: Path, project_dir: Path, step: str, seed: int = 0, cancel_after: int = 10**9) -> None:
        self.seed, self.threads, self.device = seed, 1, "cpu"
        self.project_dir = project_dir
        self.scratch = folder / "scratch" / step
        self.checkpoints = folder / "checkpoints" / step
        for made in (self.scratch, self.checkpoints):
            made.mkdir(parents=True, exist_ok=True)
        self.params: dict[str, Any] = {}
        self.points: list[tuple[str, float, int]] = []
        self.lines: list[tuple[float, float, str]] = []
        self._step, self._outputs = step, folder / "outputs"
        self._looks, self._cancel_after = 0, cancel_after

    @property
    def cancelled(self) -> bool:
        self._looks += 1
        return self._looks > self._cancel_after

    def input(self, name: str) -> Path:
        path = self._outputs / name
        if not path.exists():
            raise NotFoundError(f"no input {name}")
        return path

    def has_input(self, name: str) -> bool:
        return (self._outputs / name).exists()

    def output(self, name: str, path: Path) -> Artifact:
        place = self._outputs / f"{self._step}.{name}"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(path, place)
        listing = sorted(
            (str(file.relative_to(place)), file.read_bytes()) for file in place.rglob("*") if file.is_file()
        )
        return Artifact(digest=digest_bytes(repr(listing).encode()), size_bytes=0)

    def log_metric(self, name: str, value: float, step: int = 0) -> None:
        self.points.append((name, value, step))

    def progress(self, done: float, total: float, text: str = "") -> None:
        self.lines.append((done, total, text))


def as_spec(value: dict[str, Any]) -> Spec:
    return msgspec.convert(
        value, Spec, dec_hook=lambda kind, found: Share.parse(found) if kind is Share else kind(found)
    )
