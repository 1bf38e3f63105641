"""A fresh interpreter stays light: which heavy modules an import and a --help may load."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {
    "torch", "polars", "numpy", "sqlalchemy", "onnxruntime", "onnx", "pyarrow", "rich", "scipy", "jsonschema",
    "sklearn", "lightgbm", "uvloop", "httptools", "jinja2", "alembic", "cryptography", "tensorboardX", "PIL",
    "pandas", "orjson",
}  # fmt: skip
ALLOWED = {
    "import millrace": set(),
    "import millrace.core.spec": set(),
    "import millrace.core.spec_errors": set(),
    "import millrace.wiring": set(),
    "millrace --help": set(),
    "millrace runs --help": set(),
}


def loaded_by(program: str) -> set[str]:
    """Top-level heavy modules that a program has loaded when it ends."""
    code = f"import json, sys\ntry:\n    {program}\nexcept SystemExit:\n    pass\n"
    code += "print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(json.loads(done.stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize("what", ALLOWED)
def test_only_listed_heavy_modules_are_loaded(what: str) -> None:
    program = what
    if what.startswith("millrace "):
        program = f"sys.argv = {what.split()!r}; from millrace.__main__ import main; main()"
    assert loaded_by(program) - ALLOWED[what] == set()


def test_the_rooms_are_light_packages() -> None:
    """A room's `__init__` holds descriptors only, so that planning imports no stage."""
    rooms = (
        "batch", "loadtest", "data", "train", "compress", "serve", "monitor", "formats", "stats", "store", "compute",
        "security",
    )  # fmt: skip
    assert loaded_by("; ".join(f"import millrace.{room}" for room in rooms)) == set()


def test_the_measure_sees_a_heavy_module() -> None:
    assert loaded_by("import numpy") == {"numpy"}
