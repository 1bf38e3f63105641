"""The load test: what it counts is what happened, stalls and failures included; real rows; verdicts; two endpoints."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trustme
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.__main__ import open_transport
from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.core.errors import InputError, UnavailableError
from millrace.core.types import DatasetVersion
from millrace.formats.dataset import ColumnSchema, Manifest, PartEntry
from millrace.loadtest.client import Load, Measured, Target
from millrace.loadtest.report import render_page
from millrace.loadtest.requests import find_address, make_target
from millrace.loadtest.run import run_load, summarise
from millrace.stats.hdr import HdrHistogram, ratio_interval
from millrace.wiring import open_dispatcher

TOKEN = "a-token-of-a-test-0123456789abcdef"


def nothing(_: Measured) -> None:
    return


@pytest.fixture(scope="module")
def live(digits_bundle: Path, kit: ModuleType) -> Iterator[Any]:
    """A server that the tests may stop and count on."""
    live = kit.Live(kit.child_config(digits_bundle))
    yield live
    assert live.process.stop() == 0


@pytest.fixture(scope="module")
def target(live: Any) -> Target:
    return make_target(find_address(f"http://127.0.0.1:{live.port}", "", None), None)


def answered(live: Any) -> int:
    """How many requests the server has answered."""
    (model,) = live.call("GET", "/v2/models/digits/stats")[1]["model_stats"]
    return model["inference_stats"]["success"]["count"]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(1e-6, 3000.0), min_size=1, max_size=200), st.sampled_from([0.1, 0.5, 0.9, 0.99, 0.999, 1.0]),
    st.integers(0, 3),
)  # fmt: skip
def test_quantiles_have_three_digits(latencies: list[float], share: float, failures: int) -> None:
    histogram = HdrHistogram()
    for part in np.array_split(np.array(latencies), 3):
        other = HdrHistogram()
        other.add(part)
        histogram.merge(other)
    ordered = [*sorted(latencies), *[math.inf] * failures]
    exact = ordered[max(math.ceil(share * len(ordered) - 1e-9), 1) - 1]
    found = histogram.quantile(share, failures)
    assert found == exact == math.inf or abs(found - exact) <= 0.0011 * exact + 1e-6


def test_a_closed_loop_counts_what_the_server_counts(live: Any, target: Target) -> None:
    before = answered(live)
    (measured,), is_interrupted = run_load([target], Load(concurrency=3), 0.4, 0.1, nothing)
    after = answered(live)
    assert not is_interrupted
    assert measured.failures == 0
    assert measured.answered == measured.histogram.total > 20
    assert measured.answered < after - before, "the warm-up is not measured"
    assert len(measured.slices) > 1
    report = summarise([measured], Load(concurrency=3), 1e4)
    assert report.rows[0].verdict is not None
    assert report.rows[0].verdict.is_kept
    latencies = list(report.rows[0].latency_ms.values())
    assert latencies == sorted(latencies)  # type: ignore[type-var]


@pytest.mark.parametrize("is_poisson", [False, True])
def test_an_open_loop_sends_what_is_due(target: Target, is_poisson: bool) -> None:
    load = Load(rate=300, is_poisson=is_poisson)
    (measured,), _ = run_load([target], load, 0.6, 0, nothing)
    assert measured.statuses.total() + measured.errors.total() + measured.unsent == pytest.approx(
        180, abs=60 if is_poisson else 2
    )
    assert measured.failures == measured.statuses[503] + measured.unsent
    assert measured.lag.total > 0


def test_a_stall_is_not_omitted(live: Any, target: Target) -> None:
    """The server stands still for 0.4 s: everything that was due meanwhile is late, and the closed loop hides it."""

    def stall() -> None:
        time.sleep(0.2)
        os.kill(live.process.pid, signal.SIGSTOP)
        time.sleep(0.4)
        os.kill(live.process.pid, signal.SIGCONT)

    results = []
    for load in (Load(rate=200), Load(concurrency=1)):
        thread = threading.Thread(target=stall)
        thread.start()
        results += run_load([target], load, 0.8, 0, nothing)[0]
        thread.join()
    opened, closed = (one.histogram for one in results)
    assert opened.quantile(0.75, results[0].failures) > 0.1, "half of what was due fell into the stall"
    assert closed.quantile(0.75) < 0.1
    assert closed.greatest > 0.3
    assert opened.total + results[0].failures == pytest.approx(160, abs=4), "what was due is sent, late, or told of"


def test_failures_are_told_and_miss_the_verdict(target: Target) -> None:
    wrong = Target(
        name="wrong", host=target.host, port=target.port,
        requests=[one.replace(b"/v2/models/digits", b"/v2/models/nobody", 1) for one in target.requests],
    )  # fmt: skip
    (measured,), _ = run_load([wrong], Load(concurrency=2), 0.2, 0, nothing)
    assert measured.answered == 0
    assert measured.statuses[404] == measured.failures > 0
    report = summarise([measured], Load(concurrency=2), 1e9)
    verdict = report.rows[0].verdict
    assert verdict is not None
    assert not verdict.is_kept
    assert verdict.p99_ms is None
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        gone = Target(name="gone", host="127.0.0.1", port=closed.getsockname()[1], requests=target.requests)
        for load in (Load(rate=100), Load(concurrency=2)):
            (measured,), _ = run_load([gone], load, 0.3, 0, nothing)
            assert sum(count for why, count in measured.errors.items() if "refused" in why) > 0
            assert measured.answered == 0
    mute = socket.create_server(("127.0.0.1", 0))  # takes connections, and never answers
    silent = Target(name="mute", host="127.0.0.1", port=mute.getsockname()[1], requests=target.requests)
    (measured,), _ = run_load([silent], Load(rate=100, timeout_s=0.2, connections=4), 0.4, 0, nothing)
    mute.close()
    assert measured.errors["time-out"] >= 4
    assert measured.unsent > 0
    assert measured.failures == measured.errors.total() + measured.unsent == pytest.approx(40, abs=2)
    page = render_page(summarise([measured], Load(rate=100), 5.0), [measured])
    assert f"{measured.unsent:,} requests were due and could not be sent" in page
    assert "missed" in page


def test_two_endpoints_by_turns(live: Any, target: Target, kit: ModuleType) -> None:
    address = find_address(f"http://127.0.0.1:{live.port}/v2/models/digits", "", None)
    heavy = make_target(address, None, tensors={"pixels": kit.make_pixels(1200)}, each=600, body="json")
    assert len(heavy.requests) == 2
    load = Load(concurrency=1)
    results, _ = run_load([target, heavy], load, 0.8, 0, nothing)
    report = summarise(results, load, None)
    assert [one.percentile for one in report.ratios] == ["p50", "p90", "p99"]
    assert all(one.failures == 0 for one in results)
    median = report.ratios[0]
    assert median.ratio is not None
    assert median.low is not None
    assert median.ratio >= median.low > 1.5, "600 rows in JSON take longer than one"
    page = render_page(report, results)
    assert page.count("<polyline") == 6
    assert "<script" not in page
    assert "http-equiv" not in page


def test_the_interval_of_equals_holds_one_and_is_honest_about_drift() -> None:
    """Slices of one distribution, with a machine that gets slower by turns: 1 is inside about 95 times in 100."""
    random = np.random.default_rng(5)
    inside = 0
    for seed in range(40):
        pair: list[list[HdrHistogram]] = [[], []]
        for _ in range(20):
            drift = random.lognormal(0, 0.5)
            for side in pair:
                histogram = HdrHistogram()
                histogram.add(random.gamma(4, 1e-3 * drift * random.lognormal(0, 0.05), 200))
                side.append(histogram)
        _, low, high = ratio_interval(pair[0], pair[1], 0.5, draws=100, seed=seed)
        inside += low <= 1 <= high
    assert 33 <= inside <= 40


def test_addresses(live: Any) -> None:
    base = f"http://127.0.0.1:{live.port}"
    for path in ("", "/", "/v2/models/digits/infer", "/v1/models/digits:predict"):
        assert find_address(base + path, "", None).model == "digits"
    with pytest.raises(InputError, match="want an endpoint's name or a URL"):
        find_address("ftp://x", "", None)
    with pytest.raises(InputError, match="behind the port"):
        find_address(base + "/api", "", None)
    with pytest.raises(UnavailableError, match="does not answer"):
        find_address("http://127.0.0.1:1", "", None)
    with pytest.raises(InputError, match="a token has ASCII"):
        find_address(base, "a\r\nb", None)
    address = find_address(base, "", None)
    with pytest.raises(InputError, match="--body rows wants rows"):
        make_target(address, None, body="rows")
    with pytest.raises(InputError, match="--body binary wants tensors"):
        make_target(address, None, rows=[{"pixels": [0] * 64}], body="binary")
    for wrong in (Load(rate=0.0), Load(rate=-1.0), Load(concurrency=0)):
        with pytest.raises(InputError, match="want"):
            run_load([make_target(address, None)], wrong, 0.1, 0, nothing)


# --------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, kit: ModuleType) -> Path:
    """A home with a dataset version of images."""
    home, folder = tmp_path_factory.mktemp("home") / ".millrace", tmp_path_factory.mktemp("dataset")
    pixels = kit.make_pixels(40).astype(np.uint8)
    table = pa.table({"pixels": [row.tobytes() for row in pixels], "digit": [str(k % 10) for k in range(40)]})
    pq.write_table(table, folder / "test.parquet")
    manifest = Manifest(
        columns=[ColumnSchema(name="digit", type="category", role="label")], task="classification", label="digit",
        image=[8, 8, 1], image_columns=[f"p{k}" for k in range(64)], pixel_storage="binary", pixel_dtype="uint8",
        splits={"test": [PartEntry(path="test.parquet", rows=40, digest="", size_bytes=0)]}, rows={"test": 40},
    )  # fmt: skip
    (folder / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    dispatcher = open_dispatcher(str(home))
    services = dispatcher.services
    version = DatasetVersion(
        id="digits/1", created_at=1.0, name="digits", number=1, artifact=services.blobs.put_tree(folder)
    )  # fmt: skip
    services.records.put(version)
    dispatcher.close()
    return home


def invoke(home: Path, *arguments: str) -> tuple[int, Any]:
    done = CliRunner().invoke(
        cli, ["--home", str(home), *arguments], obj=Session(open_transport), env={"MILLRACE_TOKEN": ""}
    )  # fmt: skip
    try:
        return done.exit_code, json.loads(done.stdout)
    except json.JSONDecodeError:
        return done.exit_code, done.output


def test_real_rows_of_a_dataset_version(home: Path, live: Any, tmp_path: Path) -> None:
    url, page = f"http://127.0.0.1:{live.port}", tmp_path / "report.html"
    load = ("--concurrency", "2", "--duration", "300ms", "--warmup", "0s")
    code, report = invoke(
        home, "loadtest", url, *load, "--dataset", "digits@1", "--slo-p99-ms", "9000", "--output", str(page), "--json"
    )  # fmt: skip
    assert code == 0
    assert "rows of digits@1, 1 a request, 40 different bodies" in report["text"]
    assert report["rows"][0]["statuses"].keys() == {"200"}
    assert "p99 of at most 9000 ms kept" in page.read_text()
    code, text = invoke(home, "loadtest", url, *load, "--dataset", "digits", "--slo-p99-ms", "0.000001")
    assert code == 1
    assert "MISSED" in text
    dispatcher = open_dispatcher(str(home))
    rows = dispatcher.call("dataset.sample", {"dataset": "digits", "rows": 5, "seed": 3}).rows
    assert rows == dispatcher.call("dataset.sample", {"dataset": "digits", "rows": 5, "seed": 3}).rows
    assert [set(row) for row in rows] == [{"pixels"}] * 5, "no label"
    assert len(rows[0]["pixels"]) == 64
    with pytest.raises(InputError, match="rows: want 1 to"):
        dispatcher.call("dataset.sample", {"dataset": "digits", "rows": 0})
    dispatcher.close()


def test_rows_of_a_file_and_wrong_use(home: Path, live: Any, tmp_path: Path) -> None:
    url, rows = f"http://127.0.0.1:{live.port}", tmp_path / "rows.csv"
    rows.write_text(",".join(f"p{k}" for k in range(64)) + "\n" + ",".join("7" * 64) + "\n")
    load = ("--rate", "50", "--duration", "200ms", "--warmup", "0s")
    code, report = invoke(home, "loadtest", url, *load, "--input", str(rows), "--json")
    assert (code, report["rows"][0]["statuses"]) == (0, {"200": 10})
    rows.write_text("a,b\n1,2\n")
    code, text = invoke(home, "loadtest", url, *load, "--input", str(rows))
    assert code == 1, "nothing was answered"
    assert "answers 400" in text
    for wrong in (
        ("--concurrency", "1", "--rate", "1"),
        ("--duration", "soon"),
        ("--input", "a.csv", "--dataset", "digits"),
        ("--token-env", "NO_SUCH_VARIABLE"),
        ("--rows", "0"),
    ):
        code, text = invoke(home, "loadtest", url, *wrong)
        assert code == 2, text
    assert invoke(home, "loadtest", "nobody")[0] == 3
    assert invoke(home, "loadtest", "http://127.0.0.1:1")[0] == 10


def test_an_interrupt_tells_what_was_measured(home: Path, live: Any) -> None:
    command = [sys.executable, "-m", "millrace", "--home", str(home), "loadtest", f"http://127.0.0.1:{live.port}"]
    before = answered(live)
    child = subprocess.Popen([*command, "--rate", "100", "--warmup", "0s"], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 20
    while answered(live) - before < 30 and time.monotonic() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    output = child.communicate(timeout=20)[0]
    assert child.returncode == 130
    assert "interrupted: of what was measured until then" in output
    assert "P99 MS" in output


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_tokens_and_certificates(
    home: Path, digits_bundle: Path, kit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over TLS with a token of the environment; a wrong one, or an unknown certificate, is told of before any load."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    (tmp_path / "tokens").write_text(TOKEN + "\n")
    (tmp_path / "tokens").chmod(0o600)
    live = kit.Live(
        kit.child_config(digits_bundle, tls_cert=str(tmp_path / "cert.pem"), token_file=str(tmp_path / "tokens"))
    )
    url, ca = f"https://localhost:{live.port}/v2/models/digits", ("--ca-file", str(tmp_path / "ca.pem"))
    load = ("--concurrency", "2", "--duration", "200ms", "--warmup", "0s")
    try:
        monkeypatch.setenv("SHOP_TOKEN", TOKEN)
        code, report = invoke(home, "loadtest", url, *ca, *load, "--token-env", "SHOP_TOKEN", "--json")
        assert (code, report["rows"][0]["statuses"].keys()) == (0, {"200"}), report
        monkeypatch.setenv("SHOP_TOKEN", "mr_wrong")
        code, text = invoke(home, "loadtest", url, *ca, *load, "--token-env", "SHOP_TOKEN")
        assert (code, "answers 401" in text or "answers 403" in text) == (6, True), text
        code, text = invoke(home, "loadtest", url, *load)
        assert (code, "certificate" in text) == (10, True), text
    finally:
        live.process.stop()
