"""wrk with many bodies, answers counted by status; and the memory of a process."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent


def binary_body(name: str, datatype: str, values: np.ndarray) -> tuple[bytes, int]:
    """A V2 request with one binary tensor that wants a binary answer, and the length of its JSON."""
    tensor = {
        "name": name, "shape": list(values.shape), "datatype": datatype,
        "parameters": {"binary_data_size": values.nbytes},
    }  # fmt: skip
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + values.tobytes(), len(head)


def write_bodies(folder: Path, bodies: Iterable[tuple[bytes, int]]) -> dict[str, str]:
    """Environment for storm.lua."""
    lines, offset = [], 0
    with (folder / "bodies").open("wb") as file:
        for body, json_bytes in bodies:
            file.write(body)
            lines.append(f"{offset} {len(body)} {json_bytes}\n")
            offset += len(body)
    (folder / "index").write_text("".join(lines))
    return {"BODIES": str(folder / "bodies"), "INDEX": str(folder / "index")}


def storm(
    port: int, path: str, environment: dict[str, str], connections: int, seconds: float, cores: str = ""
) -> dict[str, Any]:
    """One run of wrk: seconds, and how many answers were good, refused, wrong, lost; latencies of all of them."""
    command = ["wrk", "-t1", "--timeout", "60s", f"-c{connections}", f"-d{max(1, round(seconds))}s",
               "-s", str(HERE / "storm.lua"), f"http://127.0.0.1:{port}{path}"]  # fmt: skip
    if cores:
        command = ["taskset", "-c", cores, *command]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"seconds"')]
    if not lines:
        raise SystemExit(f"wrk told nothing:\n{done.stdout}{done.stderr}")
    return json.loads(lines[0])


def memory_mb(pid: int) -> float:
    """What a process has in memory for itself, without files that others map too."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024
