"""The demo, and what a stranger does with its result from another terminal."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from typing_by_hand import command, environment, facts_of, run_millrace

pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("demo")
    done = run_millrace(folder, "demo")
    return folder / "digits", done.stdout


def test_the_demo_prints_every_step_and_ends(demo: tuple[Path, str]) -> None:
    folder, printed = demo
    lines = printed.splitlines()
    wanted = ["data", "train", "export", "evaluate", "compress", "register", "serve", "monitor"]
    assert [line.split()[0] for line in lines[:8]] == wanted
    assert (
        "1840 in, 43 rejected (25 duplicate, 9 unlabelled, 9 range); train 1047, validation 150, test 600" in lines[0]
    )
    assert re.search(r"epoch \d/\d #+ loss \.?\d", lines[1])
    assert re.search(r"ONNX equals PyTorch on 600 rows \(max diff \d", lines[2])
    assert "digits v1 signed -> champion (first version)" in lines[5]
    assert re.search(r"600/600 requests answered, p50 [\d.]+ ms", lines[6])
    assert re.search(r"clean: quiet \| inverted: ALERT [\d.]+ > \.\d+, pixel \d+", lines[7])
    assert lines[8].split()[:2] == ["VARIANT", "ACC"]
    assert any(line.startswith("Serving ") for line in lines)
    assert "next: cd digits && millrace serve digits" in lines[-1]
    assert (folder / "report.html").is_file()


def test_the_demo_shows_no_ids_digests_times_or_warnings(demo: tuple[Path, str]) -> None:
    _, printed = demo
    assert "sha256" not in printed
    assert not re.search(r"[0-9a-f]{16}", printed)
    assert not re.search(r"\d\d:\d\d:\d\d", printed)
    assert "arn" not in printed.replace("learn", "").lower().replace("earning", "")


def test_the_models_quality_and_guarantee(demo: tuple[Path, str]) -> None:
    facts = facts_of(demo[0])
    assert facts["evaluate"]["metrics"][0]["value"] >= 0.98
    assert facts["data"]["rows_in"] == facts["data"]["rows_kept"] + facts["data"]["rejected"]
    compress = facts["compress"]
    static = next(one for one in compress["variants"] if one["name"].startswith("int8-static"))
    assert static["size_ratio"] > 3
    chosen = next(one for one in compress["variants"] if one["name"] == compress["chosen"])
    if chosen["guarantee"] is not None and compress["chosen"] != compress["variants"][0]["name"]:
        assert chosen["guarantee"]["status"] == "certified"
        assert chosen["guarantee"]["bound"] <= chosen["guarantee"]["limit"]


@pytest.fixture(scope="module")
def server(demo: tuple[Path, str]) -> Iterator[str]:
    process = subprocess.Popen(
        command("serve", "digits@champion", "--port", "0", "--json"), cwd=demo[0], env=environment(),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    text = ""
    for line in process.stdout:
        text += line
        found = re.search(r'"url": "(http://127\.0\.0\.1:\d+)"', text)
        if found:
            break
    yield found[1]  # type: ignore[index]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode in (0, 130)


def images(folder: Path) -> list[list[float]]:
    """Raw pixels of the template's CSV that are in range."""
    rows = (folder / "digits.csv").read_text().splitlines()
    header = rows[0].split(",")
    pixels = [index for index, name in enumerate(header) if name.startswith("p")]
    found = []
    for row in rows[1:]:
        cells = row.split(",")
        values = [float(cells[index]) for index in pixels]
        if all(0 <= value <= 16 for value in values):
            found.append(values)
    return found


def post(url: str, body: object) -> dict[str, object]:
    request = urllib.request.Request(url, data=json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)


def test_curl_with_inverted_digits_raises_the_alert(demo: tuple[Path, str], server: str) -> None:
    folder = demo[0]
    clean = images(folder)
    for start in range(0, 400, 50):
        post(f"{server}/v1/models/digits:predict", {"instances": clean[start : start + 50]})
    time.sleep(2.5)
    assert json.loads(run_millrace(folder, "alerts", "--json").stdout) == []
    inverted = [[16 - value for value in image] for image in clean]
    for start in range(0, 600, 50):
        post(f"{server}/v1/models/digits:predict", {"instances": inverted[start : start + 50]})
    deadline = time.monotonic() + 20
    while not (alerts := json.loads(run_millrace(folder, "alerts", "--json").stdout)):
        assert time.monotonic() < deadline, "no alert within 20 s"
    assert alerts[0]["state"] == "open"
    assert alerts[0]["score"] > alerts[0]["threshold"]
    assert "pixel" in alerts[0]["title"]
    assert "digits" in run_millrace(folder, "endpoints").stdout


def test_a_foreign_client_works_unmodified(server: str, demo: tuple[Path, str]) -> None:
    import numpy as np
    from tritonclient import http

    client = http.InferenceServerClient(server.removeprefix("http://"))
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    name = client.get_model_metadata("digits")["inputs"][0]["name"]
    rows = np.array(images(demo[0])[:5], np.float32)
    tensor = http.InferInput(name, list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    answer = client.infer("digits", [tensor])
    assert answer.as_numpy("probabilities").shape == (5, 10)
    client.close()
