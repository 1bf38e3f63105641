"""Run every benchmark in turn and write benchmarks/RESULTS.md: figures with the command that made them.

`python benchmarks/run.py [NAME …]` runs some of them and keeps the other sections.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
SECTIONS = {
    "startup": "Start-up, a cached run, the demo",
    "step_overhead": "A no-op step",
    "journal": "A journal transition against raw sqlite3",
    "metrics_logging": "Metric logging until another process can read it",
    "search": "Searching runs",
    "train_loop": "The training loop",
    "accuracy": "Accuracy",
    "serving": "Inference, a dense net",
    "serving_digits": "Inference, the digits model",
    "serving_heavy": "Inference, a text encoder and a CNN",
    "serving_grpc": "Inference over gRPC",
    "serving_overload": "Inference, more clients than a model can answer",
    "serving_answers": "Inference, each client its own answer",
    "serving_memory": "Inference, memory over a million requests",
    "serving_shadow": "Inference beside a shadow",
    "serving_soak": "Inference, ten minutes at 80 % load",
    "drift": "Drift profile",
    "compress": "Compression",
    "mlflow_server": "MLflow's protocol, beside MLflow's own server",
    "pages": "The web pages",
    "install_size": "Installation",
    "server_start": "What a server costs to start",
    "operations": "One operation, in process and over HTTP",
    "backup": "Backups and restoring",
    "encryption": "Encrypted blobs",
    "trust": "Who may do what, asked",
    "logins": "Many who sign in at once",
}


def processor() -> str:
    """The processor's name and whether it has VNNI."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", text)
    vnni = "with VNNI" if "vnni" in text else "without VNNI"
    return f"{found[1] if found else platform.processor()}, {os.cpu_count()} cores, {vnni}"


def sections() -> dict[str, str]:
    """What RESULTS.md holds now."""
    if not RESULTS.exists():
        return {}
    parts = re.split(r"^## .*<!-- (\w+) -->$", RESULTS.read_text(), flags=re.MULTILINE)
    return {name: body.strip() for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def measure(name: str) -> str:
    """One benchmark's output as a section."""
    command = f"python benchmarks/{name}.py"
    print(f"== {command}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py"], capture_output=True, text=True, check=False, env=environment
    )
    output = done.stdout.rstrip()
    print(output, flush=True)
    if done.returncode != 0:
        print(done.stderr, file=sys.stderr)
        raise SystemExit(f"{command} ended with {done.returncode}")
    when = time.strftime("%Y-%m-%d", time.gmtime())
    return f"`{command}` ({when}, {time.monotonic() - start:.0f} s)\n\n```\n{output}\n```"


def main(names: list[str]) -> None:
    """Measure the named ones, or all that exist."""
    found = sections()
    for name in names or [name for name in SECTIONS if (FOLDER / f"{name}.py").exists()]:
        found[name] = measure(name)
        text = [
            "# Results\n",
            "Ratios are measured against a baseline in the same run. The machine is shared and noisy: trust ratios and "
            f"medians, not single times.\n\nMachine: {processor()}; Python {platform.python_version()}.\n",
        ]
        text += [f"## {SECTIONS[one]} <!-- {one} -->\n\n{found[one]}\n" for one in SECTIONS if one in found]
        RESULTS.write_text("\n".join(text))


if __name__ == "__main__":
    main(sys.argv[1:])
