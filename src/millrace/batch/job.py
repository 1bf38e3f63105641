"""Batch inference into a folder: each part is written once and whole, whatever is killed in between.

The folder holds `part-….parquet` and `_manifest.jsonl`: first what the job is, then a line for each part that is
finished, then the end. A part is written beside its place and synced; its line is synced; then it is renamed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

import msgspec

from millrace.batch.output import check_format, disk_faults, open_writer
from millrace.batch.parts import PART_ROWS, Part, Source, cut, find_sources
from millrace.batch.pool import Pool
from millrace.batch.rows import Rejection, check_columns, read_chunks
from millrace.core.errors import ConflictError, InputError
from millrace.core.types import Struct
from millrace.formats.bundle import open_bundle
from millrace.formats.session import open_session

MANIFEST = "_manifest.jsonl"
REJECTED = "rejected.jsonl"
_REJECTED_PARTS = "_rejected"
_NEWS_S = 0.2


class BatchJob(Struct, frozen=True, kw_only=True):
    """What is to be done.

    `folder`, `digest`, `variant`: of the bundle. `inputs`: files, folders or globs. `on_error`: what becomes of a
    row that the model cannot take. `workers`: processes; None: one for each core that this process may use.
    """

    folder: str
    digest: str
    variant: str
    inputs: list[str]
    output: str
    format: str = "parquet"
    part_rows: int = PART_ROWS
    on_error: Literal["fail", "skip"] = "fail"
    workers: int | None = None


class Header(Struct, frozen=True, kw_only=True):
    """What a folder of answers is of."""

    bundle: str
    variant: str
    format: str
    part_rows: int
    inputs: list[Source]


class Finished(Struct, frozen=True, kw_only=True):
    """A part that is written. `rows` were read from `first` on, `rejected` of them have no answer."""

    part: str
    file: str
    first: int
    rows: int
    rejected: int
    size_bytes: int
    digest: str
    written: str  # the name before it was renamed


class Progress(Struct, frozen=True, kw_only=True):
    """How far a job is. `share`: from 0 to 1, of the bytes of the input."""

    share: float
    rows: int
    parts: int
    rejected: int


class Summary(Struct, frozen=True, kw_only=True):
    """What a job has done; `resumed` of the parts were there before, `rows_per_s` is of the others."""

    output: str
    rows: int
    rejected: int
    parts: int
    resumed: int
    files: int
    seconds: float
    rows_per_s: float
    workers: int


class _Folder:
    """The folder of answers and its manifest, held by one process at a time. A context.

    Raises:
        ConflictError: Another process writes into it, or it holds something else.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        manifest = path / MANIFEST
        if not manifest.exists() and any(path.iterdir()):
            raise ConflictError(f"{path} is not empty, and no batch was written into it", hint="name a new folder")
        self._file: IO[bytes] = manifest.open("a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConflictError(f"another command writes into {path}", hint="wait for it, or stop it") from None
        try:
            self.finished, self.is_complete = self._read(header)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> _Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self._sweep()
        self._file.close()

    def _read(self, header: Header) -> tuple[dict[str, Finished], bool]:
        """What is finished, and whether that is all; a line that was cut off is forgotten."""
        self._file.seek(0)
        data = self._file.read()
        whole_bytes = data.rfind(b"\n") + 1
        self._file.truncate(whole_bytes)
        lines = data[:whole_bytes].splitlines()
        if not lines:
            self._append(header)
            return {}, False
        try:
            _check_same(msgspec.json.decode(lines[0], type=Header), header, self.path)
            entries = [msgspec.json.decode(line) for line in lines[1:]]
            found = {entry["part"]: msgspec.convert(entry, Finished) for entry in entries if "part" in entry}
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConflictError(f"{self.path / MANIFEST} cannot be read: {error}", hint="name a new folder") from error
        there = {name: entry for name, entry in found.items() if self._is_there(entry)}
        self._sweep()
        return there, len(there) == len(found) and bool(entries) and "end" in entries[-1]

    def _is_there(self, entry: Finished) -> bool:
        """Whether a part that was noted has its name; it gets it now where the job was killed just before."""
        place = self.path / entry.part
        if not place.exists() and (self.path / entry.written).exists():
            self._rename(entry)
        return place.exists() and place.stat().st_size == entry.size_bytes

    def _sweep(self) -> None:
        for path in self.path.glob(".part-*"):
            path.unlink()

    def _append(self, line: Any) -> None:
        self._file.write(msgspec.json.encode(line) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _rename(self, entry: Finished) -> None:
        if entry.rejected:
            rejected = self.path / _REJECTED_PARTS
            rejected.mkdir(exist_ok=True)
            written = self.path / f"{entry.written}.rejected"
            if written.exists():
                os.replace(written, rejected / f"{entry.part}.jsonl")
                _sync_folder(rejected)
        os.replace(self.path / entry.written, self.path / entry.part)
        _sync_folder(self.path)

    def publish(self, entry: Finished) -> None:
        """Note a part that is written, and give it its name."""
        self._append(entry)
        self._rename(entry)
        self.finished[entry.part] = entry

    def end(self, order: list[str]) -> None:
        """All parts are there: gather the rows without an answer, and say so."""
        parts = [self.path / _REJECTED_PARTS / f"{name}.jsonl" for name in order if self.finished[name].rejected]
        if parts:
            new = self.path / f".{REJECTED}"
            with new.open("wb") as file:
                for part in parts:
                    with part.open("rb") as rejected:
                        shutil.copyfileobj(rejected, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path / REJECTED)
            _sync_folder(self.path)
        self._append({"end": len(order), "rows": sum(self.finished[name].rows for name in order)})
        shutil.rmtree(self.path / _REJECTED_PARTS, ignore_errors=True)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_same(old: Header, new: Header, path: Path) -> None:
    """Refuse to put answers of two jobs into one folder."""
    differing = [
        (what, one, other)
        for what, one, other in (
            ("the model", old.bundle, new.bundle),
            ("the variant", old.variant, new.variant),
            ("the format", old.format, new.format),
            ("--part-rows", str(old.part_rows), str(new.part_rows)),
            ("the input", _names(old.inputs), _names(new.inputs)),
        )
        if one != other
    ]
    if not differing and old.inputs != new.inputs:
        changed = [one.path for one, other in zip(old.inputs, new.inputs, strict=True) if one != other]
        raise ConflictError(
            f"{path} has answers for {changed[0]} as it was before it was changed",
            hint="name a new folder, or delete this one to answer everything anew",
        )
    if differing:
        what, one, other = differing[0]
        raise ConflictError(
            f"{path} has answers of another job: there {what} is {one[:120]}, here {other[:120]}",
            hint="name a new folder, or delete this one to answer everything anew",
        )


def _names(sources: list[Source]) -> str:
    return ", ".join(source.path for source in sources)


class PartWork:
    """Answers parts: one in each worker.

    Args:
        job: Which bundle and how.
    """

    def __init__(self, job: BatchJob) -> None:
        bundle = open_bundle(Path(job.folder), expected_digest=job.digest)
        self._job, self._signature = job, bundle.signature
        self._session = open_session(bundle.model(job.variant), threads=1)

    def __call__(self, task: Part, say: Callable[[Any], None]) -> Finished:
        """Write a part beside its place, synced."""
        with disk_faults(Path(self._job.output)):
            return self._answer(task, say)

    def _answer(self, task: Part, say: Callable[[Any], None]) -> Finished:
        job = self._job
        written = f".{task.name}.{os.getpid()}"
        path = Path(job.output) / written
        rejected: list[Rejection] = []
        said, rows = time.monotonic(), 0
        reasons = (Path(job.output) / f"{written}.rejected").open("wb") if job.on_error == "skip" else None
        try:
            count = 0
            with open_writer(job.format, path, self._signature, has_numbers=True) as writer:
                for chunk in read_chunks(self._signature, task.span, skips=reasons is not None):
                    if chunk.tensors:
                        writer.write(chunk.numbers, self._session.run(chunk.tensors))
                    rejected = chunk.rejected
                    count += len(rejected)
                    if reasons is not None:
                        reasons.writelines(msgspec.json.encode(one) + b"\n" for one in rejected)
                    rows += len(chunk.numbers) + len(rejected)
                    if time.monotonic() - said > _NEWS_S:
                        said = time.monotonic()
                        say((task.name, rows))
            if rows != task.span.rows:
                raise InputError(f"{task.span.path} was changed while it was read", hint="start again in a new folder")
        finally:
            if reasons is not None:
                reasons.flush()
                os.fsync(reasons.fileno())
                reasons.close()
        if reasons is not None and not count:
            (Path(job.output) / f"{written}.rejected").unlink()
        return Finished(
            part=task.name, file=task.span.path, first=task.span.first, rows=rows, rejected=count,
            size_bytes=path.stat().st_size, digest=_digest_and_sync(path), written=written,
        )  # fmt: skip


def _digest_and_sync(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return f"sha256:{digest}"


def run_batch(job: BatchJob, on_progress: Callable[[Progress], None]) -> Summary:
    """Answer all rows of all files into a folder; what is there already is not done again.

    Args:
        job: What is to be done.
        on_progress: Called now and then.

    Returns:
        What was done.

    Raises:
        InputError: A file cannot be read, or, where rows are not skipped, has a bad one: names file and row.
        ConflictError: The folder holds answers of another job, or another process writes into it.
        StageError: The model failed, or a worker was killed.
    """
    if job.part_rows < 1:
        raise InputError(f"--part-rows: want at least 1, got {job.part_rows}")
    check_format(job.format)
    bundle = open_bundle(Path(job.folder), expected_digest=job.digest)
    bundle.model_path(job.variant)
    sources = find_sources(job.inputs)
    for source in sources:
        check_columns(bundle.signature, Path(source.path))
    header = Header(
        bundle=job.digest, variant=job.variant, format=job.format, part_rows=job.part_rows, inputs=sources
    )  # fmt: skip
    started = time.monotonic()
    with disk_faults(Path(job.output)), _Folder(Path(job.output), header) as folder:
        return _Run(job, sources, folder, on_progress).finish(started)


class _Run:
    """One process' share of a job."""

    def __init__(
        self, job: BatchJob, sources: list[Source], folder: _Folder, on_progress: Callable[[Progress], None]
    ) -> None:
        self._job, self._sources, self._folder, self._on_progress = job, sources, folder, on_progress
        self._parts: dict[str, Part] = {}
        self._running: dict[str, int] = {}  # rows by part
        self._resumed = self._rows = self._rejected = self._bytes = 0
        self._total_bytes = max(sum(source.size_bytes for source in sources), 1)

    def _tasks(self) -> Iterator[Part]:
        """The parts that are left."""
        identity = f"{self._job.digest} {self._job.variant}"
        for part in cut(self._sources, self._job.part_rows, identity, self._job.format):
            self._parts[part.name] = part
            entry = self._folder.finished.get(part.name)
            if entry is None:
                yield part
            else:
                self._resumed += 1
                self._count(entry)

    def _count(self, entry: Finished) -> None:
        self._running.pop(entry.part, None)
        self._rows += entry.rows
        self._rejected += entry.rejected
        self._bytes += self._parts[entry.part].size_bytes

    def _hear(self, news: tuple[str, int]) -> None:
        self._running[news[0]] = news[1]
        self._tell()

    def _tell(self) -> None:
        begun = ((self._parts[name], rows) for name, rows in self._running.items())
        done = self._bytes + sum(part.size_bytes * rows / max(part.span.rows, 1) for part, rows in begun)
        rows = self._rows + sum(self._running.values())
        progress = Progress(
            share=min(done / self._total_bytes, 1.0), rows=rows, parts=len(self._folder.finished),
            rejected=self._rejected,
        )  # fmt: skip
        self._on_progress(progress)

    def finish(self, started: float) -> Summary:
        """Do what is left."""
        tasks = self._tasks()
        workers = self._job.workers or len(os.sched_getaffinity(0))
        first = list(islice(tasks, workers))
        workers = max(1, min(workers, len(first)))
        done = 0
        if first:
            with Pool(PartWork, (self._job,), workers) as pool:
                for entry in pool.run(_chained(first, tasks), self._hear):
                    self._folder.publish(entry)
                    self._count(entry)
                    done += entry.rows
                    self._tell()
        if not self._parts:
            raise InputError(f"{self._sources[0].path}: has no rows")
        if not self._folder.is_complete:
            self._folder.end(list(self._parts))
        seconds = time.monotonic() - started
        return Summary(
            output=self._job.output, rows=self._rows, rejected=self._rejected, parts=len(self._parts),
            resumed=self._resumed, files=len(self._sources), seconds=seconds, workers=workers,
            rows_per_s=done / max(seconds, 1e-9),
        )  # fmt: skip


def _chained(first: list[Part], rest: Iterator[Part]) -> Iterator[Part]:
    yield from first
    yield from rest
