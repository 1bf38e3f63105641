"""Batch inference into a folder: order, bounded chunks, bad rows, and parts that are written once whatever is killed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.batch import job as batch_job
from millrace.batch.files import write_file
from millrace.batch.job import MANIFEST, REJECTED, BatchJob, Progress, run_batch
from millrace.batch.output import disk_faults, open_writer
from millrace.batch.parts import cut, find_sources
from millrace.batch.pool import Pool
from millrace.batch.rows import read_chunks
from millrace.core.errors import ConflictError, DiskFullError, InputError, StageError, UnavailableError
from millrace.formats.bundle import open_bundle

RUN = "import sys, msgspec; from millrace.batch import job as b; " + (
    "b.run_batch(msgspec.json.decode(sys.argv[1], type=b.BatchJob), lambda _: None)"
)


def job_of(bundle: Path, output: Path, *inputs: object, **options: Any) -> BatchJob:
    """A job with one worker, in this process."""
    settings = {"part_rows": 10, "format": "jsonl", "workers": 1, **options}
    return BatchJob(
        folder=str(bundle), digest=open_bundle(bundle).digest, variant="fp32", inputs=[str(one) for one in inputs],
        output=str(output), **settings,
    )  # fmt: skip


def run(job: BatchJob) -> batch_job.Summary:
    return run_batch(job, lambda _: None)


def answers(output: Path) -> list[dict[str, Any]]:
    """Of all parts in the order of the manifest's parts."""
    lines = [line for part in sorted(output.glob("part-*")) for line in part.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def digests(output: Path) -> dict[str, str]:
    return {part.name: hashlib.sha256(part.read_bytes()).hexdigest() for part in sorted(output.glob("part-*"))}


def write_prices(path: Path, rows: int, first: int = 0) -> Path:
    """Rows whose answer is their number."""
    path.write_text("age,income,plan\n" + "".join(f"{first + n},0,b\n" for n in range(rows)))
    return path


def test_rows_of_many_files_in_their_order(table_bundle: Path, tmp_path: Path) -> None:
    write_prices(tmp_path / "a.csv", 25)
    write_prices(tmp_path / "b.csv", 5, first=25)
    (tmp_path / "c.jsonl").write_text("".join(f'{{"age": {n}, "income": 0, "plan": "b"}}\n' for n in range(30, 52)))
    columns = {"age": list(range(52, 75)), "income": [0.0] * 23, "plan": ["b"] * 23}
    pq.write_table(pa.table(columns), tmp_path / "d.parquet", row_group_size=7)
    seen: list[Progress] = []
    summary = run_batch(job_of(table_bundle, tmp_path / "out", tmp_path / "*.*", workers=1), seen.append)
    assert (summary.rows, summary.parts, summary.files, summary.rejected) == (75, 10, 4, 0)
    found = answers(tmp_path / "out")
    assert [one["value"] for one in found] == list(map(float, range(75)))
    assert [one["row"] for one in found] == [*range(1, 26), *range(1, 6), *range(1, 23), *range(1, 24)]
    assert seen[-1].share == pytest.approx(1.0)
    assert [one.rows for one in seen] == sorted(one.rows for one in seen)


def test_parquet_has_typed_columns(digits_bundle: Path, tmp_path: Path, kit: ModuleType) -> None:
    pixels = kit.make_pixels(30)
    pq.write_table(pa.table({f"p{k}": pixels[:, k].astype(np.int16) for k in range(64)}), tmp_path / "a.parquet")
    run(job_of(digits_bundle, tmp_path / "out", tmp_path / "a.parquet", format="parquet"))
    table = pa.concat_tables([pq.read_table(part) for part in sorted((tmp_path / "out").glob("part-*"))])
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds["row"] == kinds["label"] == "int64"
    assert kinds["probability_9"] == "float"
    shares = np.stack([table.column(f"probability_{k}").to_numpy() for k in range(10)], axis=1)
    assert table.column("label").to_pylist() == shares.argmax(axis=1).tolist()
    bundle = open_bundle(digits_bundle)
    write_file(bundle, "fp32", tmp_path / "a.parquet", tmp_path / "one.csv", "csv")
    with (tmp_path / "one.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["label"]) for row in rows] == table.column("label").to_pylist()
    assert np.float32(rows[7]["probability_3"]) == shares[7, 3]


def test_a_bad_row_is_named_or_left_out(table_bundle: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("age,income,plan\n" + "1,2,a\n" * 12 + "old,2,a\n\n1,2\n" + "1,2,a\n" * 3)
    with pytest.raises(InputError) as raised:
        run(job_of(table_bundle, tmp_path / "out", bad))
    assert raised.value.message == "bad.csv row 13: age: want a number, got 'old'"
    summary = run(job_of(table_bundle, tmp_path / "out", bad, on_error="skip"))
    assert (summary.rows, summary.rejected, summary.resumed) == (17, 2, 1)
    assert [one["row"] for one in answers(tmp_path / "out")] == [*range(1, 13), 15, 16, 17]
    rejected = [json.loads(line) for line in (tmp_path / "out" / REJECTED).read_text().splitlines()]
    assert rejected == [
        {"file": "bad.csv", "row": 13, "message": "age: want a number, got 'old'"},
        {"file": "bad.csv", "row": 14, "message": "has 2 cells, the header has 3"},
    ]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name[:4] for name in names} == {"part", MANIFEST[:4], REJECTED[:4]}, "nothing else is left"


def test_a_part_of_nothing_but_bad_rows(table_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[]\n{"age": "x"}\n' + '{"age": 1, "income": 1, "plan": null}\n')
    summary = run(job_of(table_bundle, tmp_path / "out", tmp_path / "a.jsonl", part_rows=2, on_error="skip"))
    assert (summary.rows, summary.rejected, summary.parts) == (3, 2, 2)
    assert [part.stat().st_size > 0 for part in sorted((tmp_path / "out").glob("part-*"))] == [False, True]


def test_another_job_never_mixes_with_what_is_there(table_bundle: Path, digits_bundle: Path, tmp_path: Path) -> None:
    path, out = write_prices(tmp_path / "a.csv", 25), tmp_path / "out"
    job = job_of(table_bundle, out, path)
    run(job)
    before = digests(out)
    again = run(job)
    assert (again.resumed, again.parts) == (3, 3)
    other = write_prices(tmp_path / "b.csv", 25)
    refused = {
        "--part-rows": msgspec.structs.replace(job, part_rows=9),
        "the format": msgspec.structs.replace(job, format="csv"),
        "the input": msgspec.structs.replace(job, inputs=[str(other)]),
    }
    for message, changed in refused.items():
        with pytest.raises(ConflictError, match=f"another job: there {message}"):
            run(changed)
    write_prices(path, 26)
    with pytest.raises(ConflictError, match=r"as it was before it was changed"):
        run(job)
    with pytest.raises(ConflictError, match="is not empty"):
        run(job_of(table_bundle, tmp_path, path))
    assert digests(out) == before
    assert not (tmp_path / MANIFEST).exists()
    with pytest.raises(InputError, match="lacks 64 of 64 columns"):
        run(job_of(digits_bundle, tmp_path / "none", path))
    assert not (tmp_path / "none").exists()


def test_killed_anywhere_each_part_is_written_once(table_bundle: Path, tmp_path: Path) -> None:
    """SIGKILL after some parts, again and again: at the end the bytes of an undisturbed run."""
    path = write_prices(tmp_path / "a.csv", 400)
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "out"
    run(job_of(table_bundle, undisturbed, path, part_rows=2))
    job = job_of(table_bundle, out, path, part_rows=2)
    seen: dict[str, tuple[int, int]] = {}
    for wanted in (5, 90):
        child = subprocess.Popen([sys.executable, "-c", RUN, msgspec.json.encode(job).decode()])
        deadline = time.monotonic() + 30
        while len(list(out.glob("part-*"))) < wanted and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.002)
        child.kill()
        child.wait()
        _note(out, seen)
    run(job)
    _note(out, seen)
    assert len(seen) == 200
    assert digests(out) == digests(undisturbed)
    assert not list(out.glob(".*"))


def _note(out: Path, seen: dict[str, tuple[int, int]]) -> None:
    """Every part that was ever seen is still the same file."""
    for part in out.glob("part-*"):
        state = part.stat()
        assert seen.setdefault(part.name, (state.st_ino, state.st_mtime_ns)) == (state.st_ino, state.st_mtime_ns)


@pytest.mark.parametrize("at", ["rejected", "part"])
def test_killed_between_the_line_and_the_name(
    table_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The line is there, the name is not: the next run gives it, and reads no row twice."""
    path = tmp_path / "a.csv"
    path.write_text("age,income,plan\n1,2,a\nold,2,a\n" * 1)
    job = job_of(table_bundle, tmp_path / "out", path, on_error="skip")
    real, calls = os.replace, []

    def killed(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) == {"rejected": 1, "part": 2}[at]:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(batch_job.os, "replace", killed)
    monkeypatch.setattr(batch_job._Folder, "_sweep", lambda _: None)  # a killed process tidies nothing up
    with pytest.raises(KeyboardInterrupt):
        run(job)
    monkeypatch.undo()
    assert not list((tmp_path / "out").glob("part-*"))
    summary = run(job)
    assert (summary.resumed, summary.rows_per_s, summary.rejected) == (1, 0.0, 1)
    assert [one["row"] for one in answers(tmp_path / "out")] == [1]
    assert (tmp_path / "out" / REJECTED).read_text().count("\n") == 1


def test_a_line_that_was_cut_off_is_forgotten(table_bundle: Path, tmp_path: Path) -> None:
    path, out = write_prices(tmp_path / "a.csv", 25), tmp_path / "out"
    run(job_of(table_bundle, out, path))
    before = digests(out)
    manifest = out / MANIFEST
    manifest.write_bytes(b"".join(manifest.read_bytes().splitlines(keepends=True)[:2]) + b'{"part":"par')
    assert run(job_of(table_bundle, out, path)).resumed == 1
    assert digests(out) == before
    (out / sorted(before)[1]).write_text("")
    assert run(job_of(table_bundle, out, path)).resumed == 2, "a part that was damaged is written anew"
    assert digests(out) == before
    manifest.write_text("rubbish\n")
    with pytest.raises(ConflictError, match="cannot be read"):
        run(job_of(table_bundle, out, path))


def test_one_command_at_a_time(table_bundle: Path, tmp_path: Path) -> None:
    path, out = write_prices(tmp_path / "a.csv", 25), tmp_path / "out"
    job = job_of(table_bundle, out, path)

    def intrude(_: Progress) -> None:
        with pytest.raises(ConflictError, match="another command writes"):
            run(job)

    assert run_batch(job, intrude).parts == 3


def test_all_cores_and_a_killed_worker(digits_bundle: Path, tmp_path: Path, kit: ModuleType) -> None:
    pixels = kit.make_pixels(400)
    header = ",".join(f"p{k}" for k in range(64))
    np.savetxt(tmp_path / "a.csv", pixels, "%d", ",", header=header, comments="")
    with (
        pytest.raises(StageError, match="a worker ended with code -9") as raised,
        Pool(signal.raise_signal, (signal.SIGKILL,), 2) as pool,  # type: ignore[arg-type]
    ):
        list(pool.run(iter([1, 2]), print))
    assert "goes on where it stopped" in raised.value.hint
    two = run(job_of(digits_bundle, tmp_path / "two", tmp_path / "a.csv", workers=2, part_rows=100))
    one = run(job_of(digits_bundle, tmp_path / "one", tmp_path / "a.csv", workers=1, part_rows=100))
    assert (two.workers, one.workers) == (2, 1)
    assert digests(tmp_path / "two") == digests(tmp_path / "one")


CELL = st.text(st.sampled_from('a1 ,"\r\n\té'), max_size=4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(CELL, CELL, st.booleans()), max_size=12), st.integers(1, 5), st.booleans())
def test_however_a_csv_is_cut_it_has_the_same_rows(
    table_bundle: Path, tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, bool]], size: int,
    is_crlf: bool,
) -> None:  # fmt: skip
    """Quotes, line ends in cells, blank lines: a part never begins inside a record, and no row is lost or doubled."""
    folder = tmp_path_factory.mktemp("cut")
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\r\n" if is_crlf else "\n")
    writer.writerow(["age", "income", "plan"])
    for number, (plan, _, has_blank) in enumerate(rows):
        writer.writerow([number, 0, plan if is_crlf else plan.replace("\r", "")])  # else it would not be quoted
        text.write("\n" if has_blank else "")
    path = folder / "a.csv"
    path.write_text(text.getvalue(), encoding="utf-8", newline="")
    signature = open_bundle(table_bundle).signature
    parts = list(cut(find_sources([str(path)]), size, "x", "csv"))
    chunks = [chunk for part in parts for chunk in read_chunks(signature, part.span)]
    found = [float(value) for chunk in chunks for value in chunk.tensors["numbers"][:, 0]]
    assert found == list(map(float, range(len(rows))))
    assert [int(number) for chunk in chunks for number in chunk.numbers] == list(range(1, len(rows) + 1))
    assert all(part.span.rows <= size for part in parts)
    assert len({part.name for part in parts}) == len(parts)


def test_a_full_disk_and_rubbish_are_errors_of_ours(table_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\0" * 100)
    (tmp_path / "empty.csv").write_text("age,income,plan\n")
    (tmp_path / "full.csv").write_text("age,income,plan\n1,2,a\n")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        run(job_of(table_bundle, tmp_path / "out", tmp_path / "a.parquet"))
    with pytest.raises(InputError, match="has no rows"):
        run(job_of(table_bundle, tmp_path / "out", tmp_path / "empty.csv"))
    with pytest.raises(InputError, match="fits no file"):
        run(job_of(table_bundle, tmp_path / "out", tmp_path / "*.tsv"))
    with pytest.raises(InputError, match="--part-rows"):
        run(job_of(table_bundle, tmp_path / "out", tmp_path / "full.csv", part_rows=0))
    bundle = open_bundle(table_bundle)
    with pytest.raises(UnavailableError, match="nowhere"):
        write_file(bundle, "fp32", tmp_path / "full.csv", tmp_path / "nowhere/a.csv", "csv")
    with (
        pytest.raises(DiskFullError, match="is full"),
        disk_faults(tmp_path),
        open_writer("csv", Path("/dev/full"), bundle.signature, has_numbers=False) as writer,
    ):
        writer.write(np.arange(9), {"value": np.zeros((9, 1), np.float32)})
