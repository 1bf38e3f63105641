"""What processes of a group had counted that are no more: in one file, and counted once at any moment."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgspec

from millrace.serve.peers import Peers, Snapshot, fold

PIDS = range(100, 140)


def counted(rows: int) -> Snapshot:
    text = f"# TYPE millrace_rows_total counter\nmillrace_rows_total {rows}\nmillrace_queue_requests 3\n"
    return Snapshot(
        endpoints={"digits": text}, statistics={"digits": [{"name": "d", "version": "1", "inference_count": rows}]}
    )


def keep(folder: Path, pid: int, rows: int) -> None:
    (folder / f"{pid}-7.kept").write_bytes(msgspec.msgpack.encode(counted(rows)))
    (folder / f"{pid}-7.sock").touch()  # of a process that was killed


def total(found: list[Snapshot]) -> tuple[float, int]:
    lines = [line for one in found for line in one.endpoints.get("digits", "").splitlines()]
    rows = sum(float(line.split()[-1]) for line in lines if line.startswith("millrace_rows_total "))
    return rows, sum(model["inference_count"] for one in found for model in one.statistics.get("digits", []))


def test_whoever_adds_up_while_files_are_put_together_counts_each_once(tmp_path: Path) -> None:
    for pid in PIDS:
        keep(tmp_path, pid, pid)
    peers = Peers(tmp_path, lambda: counted(5))
    whole = sum(PIDS) + 5
    folding = threading.Thread(target=lambda: [fold(tmp_path, pid) for pid in PIDS])
    folding.start()
    seen = set()
    while folding.is_alive():
        seen.add(total(asyncio.run(peers.ask())))
    folding.join()
    seen.add(total(asyncio.run(peers.ask())))
    assert seen == {(whole, whole)}
    assert [path.name for path in tmp_path.iterdir()] == ["gone.kept"]


def test_only_what_grows_is_kept_of_who_is_no_more(tmp_path: Path) -> None:
    keep(tmp_path, 100, 4)
    keep(tmp_path, 1001, 6)  # another process, whose number begins alike
    fold(tmp_path, 100)
    assert {path.stem for path in tmp_path.iterdir()} == {"gone", "1001-7"}
    own, gone, other = asyncio.run(Peers(tmp_path, lambda: counted(5)).ask())
    assert "millrace_rows_total 4" in gone.endpoints["digits"]
    assert ["millrace_queue_requests" in one.endpoints["digits"] for one in (own, gone, other)] == [True, False, False]


def test_a_process_that_kept_nothing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "9-1.sock").touch()
    fold(tmp_path, 9)
    assert total(asyncio.run(Peers(tmp_path, lambda: counted(2)).ask())) == (2.0, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["gone.kept"]
