"""Requests kept with their answers: sampled, masked, bounded, whole lines whatever the disk does; and trained on."""

from __future__ import annotations

import itertools
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import NotFoundError
from millrace.core.spec import Capture, Data
from millrace.core.types import Endpoint
from millrace.data.sources import read_source
from millrace.formats.signature import Signature, TensorSpec
from millrace.serve.batching import Call, Job, Outputs
from millrace.serve.capture import MASKED, Part, Recorder, without_personal
from millrace.wiring import open_dispatcher

PREDICT = "/v1/models/prices:predict"


def until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 10
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return value


def kept(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.rglob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]


def metric(live: Any, name: str) -> float:
    _, text = live.call("GET", "/metrics")
    return float(next(line for line in text.splitlines() if line.startswith(name)).rpartition(" ")[2])


def test_rows_become_a_source_of_data(observed: Any) -> None:
    """What is kept is read by the reader that runs use; the masked column is empty."""
    rows = [{"age": 200 + at, "income": at + 0.5 if at else None, "plan": "mail ada@example.org"} for at in range(5)]
    assert observed.call("POST", PREDICT, {"instances": rows})[0] == 200
    folder = observed.folder / "captured" / "prices"
    mine = until(lambda: [one for one in kept(folder) if one["plan"] == "mail <email>"])
    assert len(mine) == 5
    assert [one["income"] for one in mine] == [None, 1.5, 2.5, 3.5, 4.5]
    assert [one["age"] for one in mine] == [None] * 5
    assert [one["answered_price"] for one in mine] == [200.0, 202.5, 204.5, 206.5, 208.5]
    assert {one["model_version"] for one in mine} == {"3"}
    table = read_source(Data(source="captured/prices/*.jsonl", label="answered_price"), observed.folder)
    assert {"captured_at", "model_version", "age", "income", "plan", "answered_price"} <= set(table.frame.columns)
    assert table.frame.height == len(kept(folder))
    assert metric(observed, "millrace_captured_rows_total{") == table.frame.height


def test_a_full_disk_disturbs_nobody_and_is_counted(observed: Any) -> None:
    folder = observed.folder / "captured" / "prices"

    def ask(income: float) -> int:
        return observed.call("POST", PREDICT, {"instances": [{"age": 1.0, "income": income, "plan": "b"}]})[0]

    def is_kept(income: float) -> bool:  # and, since they are written in turn, all before it
        return folder.exists() and any(one["income"] == income for one in kept(folder))

    assert ask(300) == 200
    until(lambda: is_kept(300))
    before, lost = len(kept(folder)), metric(observed, "millrace_capture_dropped_total{")
    pid = observed.process.pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (10, hard))  # the kernel refuses every line from now on
    try:
        assert [ask(301 + at) for at in range(20)] == [200] * 20
        until(lambda: metric(observed, "millrace_capture_dropped_total{") == lost + 20)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))
    assert len(kept(folder)) == before
    assert ask(400) == 200
    until(lambda: is_kept(400))
    assert len(kept(folder)) == before + 1  # every line is whole


def test_nothing_is_kept_unless_asked_for(table: Any) -> None:
    table.call("POST", PREDICT, {"instances": [{"age": 1, "income": 1.0, "plan": "b"}]})
    assert metric(table, "millrace_captured_rows_total{") == 0


def test_it_is_counted_and_a_spec_can_read_it(tmp_path: Path) -> None:
    dispatcher = open_dispatcher(str(tmp_path / ".millrace"))
    with dispatcher.services.records.transaction() as transaction:
        transaction.put(Endpoint(id="ill", name="ill", model="ill", number=1, variant="fp32"))
    assert dispatcher.call("endpoint.captured", {"name": "ill"}).rows == 0
    recorder = Recorder(Capture(share=1.0), tmp_path / ".millrace" / "captured" / "ill", SIGNATURE, "1")
    recorder.take(call_of(3))
    recorder.close()
    found = dispatcher.call("endpoint.captured", {"name": "ill"})
    assert (found.rows, found.parts, found.source) == (3, 1, ".millrace/captured/ill/*.jsonl")
    assert read_source(Data(source=found.source, label="answered_ill"), tmp_path).frame.height == 3
    with pytest.raises(NotFoundError, match="'other' was ever served"):
        dispatcher.call("endpoint.captured", {"name": "other"})
    dispatcher.close()


# ---------------------------------------------------------------------- what is written

SIGNATURE = Signature(
    task="classification", label="ill", classes=["no", "yes"],
    inputs=[
        TensorSpec(name="numbers", dtype="float32", shape=[-1, 2], semantic="number", columns=["age", "weight"]),
        TensorSpec(name="notes", dtype="string", shape=[-1, 1], semantic="text", columns=["note"]),
    ],
    outputs=[TensorSpec(name="probabilities", dtype="float32", shape=[-1, 2])],
)  # fmt: skip


def call_of(requests: int, rows: int = 1, note: str = "x") -> Call:
    shared = Outputs({"probabilities": np.tile(np.array([[0.25, 0.75]], np.float32), (requests * rows, 1))})
    jobs = []
    for number in range(requests):
        numbers = np.full((rows, 2), number, np.float32)
        job = Job({"numbers": numbers, "notes": np.full((rows, 1), note, dtype=object)})
        job.shared, job.start = shared, number * rows
        jobs.append(job)
    return Call({}, shared.tensors, jobs, 0, 0)


def test_masks_and_rules(tmp_path: Path) -> None:
    recorder = Recorder(Capture(share=1.0, mask=["weight", "note"]), tmp_path, SIGNATURE, "7")
    recorder.take(call_of(2, rows=2))
    recorder.close()
    row = {"age": 1.0, "weight": None, "note": MASKED, "model_version": "7", "answered_ill": "yes", "confidence": 0.75}
    rows = kept(tmp_path)
    assert all(one.pop("captured_at").endswith("Z") for one in rows)
    assert rows == [{**row, "age": 0.0}] * 2 + [row] * 2
    assert (recorder.rows, recorder.dropped) == (4, 0)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("write to ada.b+c@mail.example.org now", "write to <email> now"),
        ("call +1 (555) 010-9999 or 030/1234567", "call <number> or <number>"),
        ("card 4111 1111 1111 1111", "card <number>"),
        ("DE89 3704 0044 0532 0130 00", "<number>"),
        ("from 192.168.1.20:", "from <address>:"),
        ("room 12, 3.14 kg, in 2024, v1.2.3", "room 12, 3.14 kg, in 2024, v1.2.3"),
    ],
)
def test_what_looks_personal(text: str, shown: str) -> None:
    assert without_personal(text) == shown


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=300))
def test_rules_end_soon_on_any_text(text: str) -> None:
    without_personal(text + "1 " * 300 + "a@" * 100)


def test_a_share_of_the_requests_is_taken(tmp_path: Path) -> None:
    recorder = Recorder(Capture(share=0.1), tmp_path, SIGNATURE, "1")
    for _ in range(400):
        recorder.take(call_of(10))
    recorder.close()
    assert 280 < recorder.rows < 530  # 400, and six standard deviations around
    assert len(kept(tmp_path)) == recorder.rows
    ages = [one["age"] for one in kept(tmp_path)]
    assert len(set(ages)) == 10  # of every place in a call


def test_parts_never_take_more_than_their_room(tmp_path: Path) -> None:
    part = Part(tmp_path, "1", max_bytes=100_000)
    for number in range(400):
        part.write(b'{"n":1%06d}\n' % number * 100)
        assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 100_000
    part.close()
    numbers = [one["n"] for one in kept(tmp_path)]
    assert all(one <= other for one, other in itertools.pairwise(numbers))
    assert numbers[-1] == 1000399  # the oldest went
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_a_clock_that_jumps_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(Capture(share=1.0), tmp_path, SIGNATURE, "1")
    for at_s in (2e9, 1e9, 0.0):  # back to 1970
        monkeypatch.setattr("millrace.serve.capture.time.time", lambda at_s=at_s: at_s)
        recorder.take(call_of(1))
    recorder.close()
    assert [one["captured_at"][:4] for one in kept(tmp_path)] == ["2033", "2001", "1970"]
