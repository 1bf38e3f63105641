"""Every example does what its README says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def environment() -> dict[str, str]:
    """The test's environment without a home, with this interpreter's commands first."""
    commands = Path(sys.executable).parent
    path = f"{commands}{os.pathsep}{os.environ.get('PATH', '')}"
    return {key: value for key, value in os.environ.items() if key != "MILLRACE_HOME"} | {
        "PATH": path,
        "MILLRACE_COLOR": "never",
        "BROWSER": "true",
    }


def shell(script: str, folder: Path) -> str:
    """Run a script; a failure shows everything it printed."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def commands(readme: Path) -> str:
    """The first bash block of an example's README."""
    match = re.search(r"```bash\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert match, f"{readme} shows no commands"
    return match[1]


@pytest.fixture
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the example that the test names."""
    return Path(shutil.copytree(EXAMPLES / request.param, tmp_path / "example"))


def test_every_folder_is_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    missing = [path.name for path in EXAMPLES.iterdir() if path.is_dir() and f"]({path.name}/" not in listed]
    assert missing == []


def test_every_folder_is_tested() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    missing = [path.name for path in EXAMPLES.iterdir() if path.is_dir() and f'"{path.name}"' not in text]
    assert missing == []


@pytest.mark.slow
@pytest.mark.rotating(1, "examples")
@pytest.mark.parametrize("example", ["digits"], indirect=True)
def test_digits(example: Path) -> None:
    script = "\n".join(line for line in commands(example / "README.md").splitlines() if "serve" not in line)
    printed = shell(script, example)
    assert "register" in printed
    assert (example / "digits/report.html").exists()


@pytest.mark.slow
@pytest.mark.rotating(1, "examples")
@pytest.mark.parametrize("example", ["csv"], indirect=True)
def test_a_table_of_classes(example: Path) -> None:
    shell(commands(example / "README.md"), example)
    spec = (example / "millrace.yaml").read_text(encoding="utf-8")
    assert len(spec.splitlines()) <= 14
    assert "sample_id" in spec  # a unique id is left out
    answers = (example / "answers.csv").read_text(encoding="utf-8").splitlines()
    assert len(answers) == 570
    assert any("malignant" in line for line in answers[1:])


@pytest.mark.slow
@pytest.mark.rotating(1, "examples")
@pytest.mark.parametrize("example", ["csv"], indirect=True)
def test_a_table_of_numbers(example: Path) -> None:
    shell("python make_data.py\nmillrace init --data diabetes.csv --label progression\nmillrace run", example)
    models = json.loads(shell("millrace models --json", example))
    assert models[0]["digest"].startswith("sha256:")
    assert "champion" in models[0]["aliases"]


@pytest.mark.slow
@pytest.mark.rotating(1, "examples")
@pytest.mark.parametrize("example", ["own-model"], indirect=True)
def test_a_model_made_elsewhere(example: Path) -> None:
    printed = shell(commands(example / "README.md"), example)
    assert "fp32" in printed
    assert (example / "exported/model.onnx").stat().st_size > 100_000


@pytest.mark.parametrize("example", ["tracking"], indirect=True)
def test_tracking(example: Path) -> None:
    printed = shell(commands(example / "README.md"), example)
    assert "loss 0." in printed
    shown = json.loads(shell("millrace runs --json", example))
    assert shown[0]["name"] == "softmax"
    assert shown[0]["state"] == "succeeded"


def test_the_page_on_tracking(tmp_path: Path) -> None:
    page = (ROOT / "docs/how-to/track.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "weights.npz").write_bytes(b"weights")
    (tmp_path / "script.py").write_text(code, encoding="utf-8")
    shell("python script.py", tmp_path)
    (shown,) = json.loads(shell("millrace runs --json", tmp_path))
    assert (shown["name"], shown["state"]) == ("softmax", "succeeded")


@pytest.mark.slow
@pytest.mark.rotating(1, "examples")
@pytest.mark.parametrize("example", ["notebook"], indirect=True)
def test_notebook(example: Path) -> None:
    code = (
        "import nbclient, nbformat\n"
        "notebook = nbformat.read('digits.ipynb', as_version=4)\n"
        "nbclient.NotebookClient(notebook, timeout=300, kernel_name='python3').execute()\n"
        "nbformat.write(notebook, 'done.ipynb')\n"
    )
    (example / "execute.py").write_text(code, encoding="utf-8")
    shell("python -W ignore execute.py", example)
    cells = json.loads((example / "done.ipynb").read_text(encoding="utf-8"))["cells"]
    shown = [output["data"] for cell in cells for output in cell.get("outputs", ()) if "data" in output]
    assert "text/html" in shown[0]  # the run shows itself
    assert len(shown) == 3
