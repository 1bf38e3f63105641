"""The wheel: everything that the package needs and what plug-in authors run, and nothing else."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "millrace"


def package_files() -> set[str]:
    """Every file of the package, as it stands in a wheel."""
    found = (path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(PACKAGE.parent).as_posix() for path in found}


def build(source: Path, folder: Path, umask: int = 0o022, **variables: str) -> Path:
    """A wheel of the repository, or of a copy of it, in a folder that is made if need be."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    done = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(folder), str(source)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False, umask=umask,
        env=environment | variables,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (built,) = folder.glob("*.whl")
    return built


def copy_source(target: Path) -> Path:
    """What a wheel is built of, without what tools have left."""
    target.mkdir()
    shutil.copytree(ROOT / "src", target / "src", ignore=shutil.ignore_patterns("__pycache__", ".*"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("building needs pip and hatchling")
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


def test_it_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - about == package_files()
    assert {name.split("/")[-1] for name in about} >= {"METADATA", "RECORD", "LICENSE", "entry_points.txt"}
    assert not any("tests/" in name or name.endswith((".csv", ".parquet", ".npz", ".db")) for name in names)
    assert wheel.stat().st_size < 2_000_000


@pytest.mark.parametrize(
    "name",
    [
        "testing/records.py",
        "testing/blobs.py",
        "testing/compute.py",
        "testing/runtime.py",
        "templates/digits/millrace.yaml",
        "templates/digits/model.py",
        "store/migrations/versions/v0001_first.py",
        "control/report_templates/report.html",
        "static/style.css",
        "static/vendor/uPlot.js",
        "static/vendor/uPlot.LICENSE.txt",
        "api/pages/templates/layout.html",
    ],
)
def test_it_holds_what_is_read_at_run_time(wheel: Path, name: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read(f"millrace/{name}") == (PACKAGE / name).read_bytes()


def test_a_plug_in_author_runs_the_conformance_suites_from_it(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, without the repository: its own Blobs pass the suite that it ships."""
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "test_mine.py").write_text(
        "import millrace\n"
        "from millrace.store.blobs_local import LocalBlobs\n"
        "from millrace.testing.blobs import BlobsConformance\n"
        f"assert millrace.__file__.startswith({str(tmp_path / 'site')!r})\n"
        "class TestMine(BlobsConformance):\n"
        "    def open(self, place):\n"
        "        return LocalBlobs(place)\n"
        "    def damage(self, blobs, digest):\n"
        "        place = next(p for p in blobs.root.rglob('*') if p.is_file() and digest.endswith(p.name))\n"
        "        place.chmod(0o644)\n"
        "        place.write_bytes(b'damaged')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_mine.py"], cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "site")}, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_whoever_builds_it_gets_the_same_bytes(tmp_path: Path) -> None:
    """Another folder, other times and rights of files, another umask, time zone and hash seed: the same SHA-256."""
    ours, theirs = copy_source(tmp_path / "ours"), tmp_path / "theirs" / "deeper"
    shutil.copytree(ours, theirs)
    for path in theirs.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
        path.chmod(0o700 if path.is_dir() else 0o600)
    first = build(ours, tmp_path / "first")
    again = build(theirs, tmp_path / "again", 0o077, TZ="Asia/Tokyo", LC_ALL="C", PYTHONHASHSEED="7")
    assert again.name == first.name
    assert hashlib.sha256(again.read_bytes()).hexdigest() == hashlib.sha256(first.read_bytes()).hexdigest()
