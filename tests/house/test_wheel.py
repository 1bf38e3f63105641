"""The wheel: everything that the package needs and what plug-in authors run, and nothing else."""

from __future__ import annotations

import importlib.util
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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if importlib.util.find_spec("hatchling") is None or importlib.util.find_spec("pip") is None:
        pytest.skip("building needs pip and hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*command, "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    (built,) = folder.glob("*.whl")
    return built


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
