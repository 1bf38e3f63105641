"""The demo, and what a stranger does with its result from another terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
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


def is_rounded(text: str, value: float) -> bool:
    """Whether a printed number is `value` to the places that are printed: `.02`, `2e-06`, `99.3`, `592KB`, `86us`."""
    number, unit = re.fullmatch(r"([-+]?[\d.]+(?:e[-+]?\d+)?) ?([a-zA-Z]*)", text).groups()  # type: ignore[union-attr]
    scale = {"": 1, "x": 1, "pp": 1e-2, "KB": 1e3, "MB": 1e6, "us": 1e-6, "ms": 1e-3, "s": 1}[unit]
    digits, _, exponent = number.partition("e")
    place = 10.0 ** (int(exponent or 0) - len(digits.partition(".")[2])) * scale
    return abs(float(number) * scale - value) <= 0.5001 * place


def test_what_is_printed_was_measured(demo: tuple[Path, str], tmp_path: Path) -> None:
    """Read as a person reads it, against the facts recorded, and those against the files themselves."""
    folder, printed = demo
    lines = {line.split()[0]: line for line in printed.splitlines()}
    facts = facts_of(folder)
    data = facts["data"]
    counts = [int(number) for number in re.findall(r"\d+", re.sub(r" {3}\S+ ?m?s$", "", lines["data"]))]
    assert counts == [data["rows_in"], data["rejected"], *data["rejected_by_reason"].values(), *data["split"].values()]
    assert data["rows_in"] == len((folder / "digits.csv").read_text().splitlines()) - 1
    assert sum(data["split"].values()) == data["rows_kept"]

    epoch = re.search(r"epoch (\d+)/\d+ #+ loss (\S+) val (\S+) %", lines["train"])
    assert epoch
    assert int(epoch[1]) == len(facts["train"]["epochs"])
    assert is_rounded(epoch[2], facts["train"]["epochs"][-1]["loss"])
    assert is_rounded(epoch[3], 100 * facts["train"]["best_score"])
    export = re.search(r"on (\d+) rows \(max diff (\S+)\)", lines["export"])
    assert export
    assert int(export[1]) == facts["export"]["rows"] == data["split"]["test"]
    assert is_rounded(export[2], facts["export"]["max_difference"])
    scores = re.findall(r"(\w+) (\S+) % \((\S+) % to (\S+) %\)", lines["evaluate"])
    metrics = facts["evaluate"]["metrics"]
    assert [name for name, *_ in scores] == [metric["name"] for metric in metrics]
    for (_, *texts), metric in zip(scores, metrics, strict=True):
        assert all(
            is_rounded(text, 100 * metric[key]) for text, key in zip(texts, ("value", "low", "high"), strict=True)
        )
    confusion = facts["evaluate"]["confusion"]
    assert metrics[0]["value"] == sum(confusion[i][i] for i in range(10)) / data["split"]["test"]
    serve = re.search(r"(\d+)/(\d+) requests answered, p50 (\S+ ms)", lines["serve"])
    assert serve
    assert (int(serve[1]), int(serve[2])) == (facts["serve"]["answered"], facts["serve"]["requests"])
    assert is_rounded(serve[3], facts["serve"]["p50_s"])
    alert = re.search(r"inverted: ALERT (\S+) > (\S+), (pixel \d+)", lines["monitor"])
    window = next(one for one in facts["monitor"]["windows"] if one["label"] == "inverted")
    assert alert
    assert is_rounded(alert[1], window["score"])
    assert is_rounded(alert[2], window["threshold"])
    assert alert[3] == window["top"][0]["name"]


def test_the_table_of_variants_was_measured(demo: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = demo
    compress = facts_of(folder)["compress"]
    lines = printed.splitlines()
    head = next(index for index, line in enumerate(lines) if line.split()[0] == "VARIANT")
    table = [re.split(r" {2,}", line.strip()) for line in lines[head + 1 : head + 1 + len(compress["variants"])]]
    assert [row[0].lstrip("*") for row in table] == [variant["name"] for variant in compress["variants"]]
    assert [row[0][1:] for row in table if row[0].startswith("*")] == [compress["chosen"]]
    run_millrace(folder, "models", "export", "digits@champion", "--to", str(tmp_path / "out"))
    for row, variant in zip(table, compress["variants"], strict=True):
        _, score, drop, changed, size, *speeds = row
        guarantee, latency = variant["guarantee"], variant["latency"]
        if guarantee is None:
            assert (drop, changed) == ("-", "-")
            assert is_rounded(score, 100 * compress["variants"][1]["guarantee"]["base_score"])
            assert all(is_rounded(text, one["p50_s"]) for text, one in zip(speeds, latency, strict=True))
        else:
            assert is_rounded(score, 100 * guarantee["score"])
            assert drop.startswith(f"<={100 * guarantee['bound']:.2f}pp")
            assert changed == f"{guarantee['changed']}/{guarantee['rows']}"
            assert all(is_rounded(text, one["speedup"]) for text, one in zip(speeds, latency, strict=True))
        file = tmp_path / "out" / ("model.onnx" if variant["name"] == "fp32" else f"variants/{variant['name']}.onnx")
        if file.exists():  # certified variants are in the bundle
            assert is_rounded(size, file.stat().st_size)
        assert is_rounded(size, variant["size_bytes"])
    assert (tmp_path / "out" / "model.onnx").exists()
    chosen = next(one for one in compress["variants"] if one["name"] == compress["chosen"])
    said = next(line for line in lines if line.startswith("Serving "))
    if chosen["guarantee"] is not None:
        ratio, loss = re.search(r"(\S+x) smaller, loses at most (\S+) points", said).groups()  # type: ignore[union-attr]
        assert is_rounded(ratio, chosen["size_ratio"])
        assert is_rounded(loss, 100 * chosen["guarantee"]["bound"])


def test_keep_serves_until_ctrl_c(demo: tuple[Path, str], tmp_path: Path) -> None:
    """In a copy of the finished demo, so that what it serves is there already."""
    shutil.copytree(demo[0], tmp_path / "digits")
    spec = tmp_path / "digits" / "millrace.yaml"
    text = spec.read_text()
    assert "port: 8080" in text
    spec.write_text(text.replace("port: 8080", "port: 0"))
    process = subprocess.Popen(
        command("demo", "--keep"), cwd=tmp_path, env=environment(), start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    ready = next(line for line in process.stdout if line.startswith(" ready "))
    url = re.search(r"http://127\.0\.0\.1:\d+$", ready.rstrip())
    assert url
    answer = post(f"{url[0]}/v1/models/digits:predict", {"instances": images(demo[0])[:2]})
    assert len(answer["predictions"]) == 2  # type: ignore[arg-type]
    children = psutil.Process(process.pid).children(recursive=True)
    assert children, "the data plane is a process of its own"
    os.killpg(process.pid, signal.SIGINT)  # what a terminal does on Ctrl-C: to every process of the foreground
    printed, said = process.communicate(timeout=30)
    assert process.returncode == 0
    assert [line.split()[0] for line in printed.splitlines()] == ["stopping", "stopped"]
    assert said == ""
    assert psutil.wait_procs(children, timeout=5)[1] == []
    with pytest.raises(urllib.error.URLError):
        post(f"{url[0]}/v1/models/digits:predict", {"instances": []})
    states = json.loads(run_millrace(tmp_path / "digits", "endpoints", "--json").stdout)
    assert [state["state"] for state in states] == ["stopped"]


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
