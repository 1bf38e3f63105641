"""Inference with the demo's own model: what `millrace demo` serves, exported and put through serving.py."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Make the model, then measure."""
    millrace = [sys.executable, "-m", "millrace"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*millrace, "demo"], cwd=folder, check=True, capture_output=True)
        digits = folder / "digits"
        subprocess.run(
            [*millrace, "models", "export", "digits", "--to", "out"], cwd=digits, check=True, capture_output=True
        )
        listed = subprocess.run([*millrace, "models", "--json"], cwd=digits, check=True, capture_output=True, text=True)
        variant = json.loads(listed.stdout)[0]["variant"]
        model = digits / "out" / ("model.onnx" if variant == "fp32" else f"variants/{variant}.onnx")
        print(f"the demo's served variant: {variant}", flush=True)
        subprocess.run(
            [sys.executable, Path(__file__).parent / "serving.py", "--model", model, "--rounds", "2"], check=True
        )


if __name__ == "__main__":
    main()
