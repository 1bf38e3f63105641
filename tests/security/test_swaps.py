"""What was verified is what is loaded: files swapped between check and use (CWE-367).

And models that were tampered with, are unsigned, signed by strangers, or older than they say (CWE-345, CWE-347,
CWE-757).
"""

from __future__ import annotations

import os
import pickle
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from millrace.control.dispatch import Dispatcher
from millrace.control.models import open_version, resolve_model
from millrace.core.errors import CorruptError, MillraceError
from millrace.core.types import ModelVersion
from millrace.formats.bundle import open_bundle
from millrace.security.signing import HomeSigner
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.testing.graphs import scaler, write_scaler
from millrace.wiring import open_dispatcher


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    yield opened
    opened.close()


_WATCH: list[Callable[[str], None]] = []


def _on_audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCH and event == "open" and isinstance(arguments[0], str | os.PathLike):
        _WATCH[0](os.fspath(arguments[0]))


sys.addaudithook(_on_audit)


class Swap:
    """Somebody who waits beside a file: it is replaced right after it was opened for the `after`th time.

    The interpreter tells of every file before it opens it; the next one that it opens after those is the moment.
    """

    def __init__(self, path: Path, data: bytes, after: int = 1) -> None:
        self._path, self._data, self._left = path, data, after
        self.is_done = False
        self._thread = threading.get_ident()

    def __enter__(self) -> Swap:
        _WATCH.append(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        _WATCH.clear()

    def _see(self, name: str) -> None:
        if self.is_done or threading.get_ident() != self._thread:
            return
        if self._left == 0:
            self.is_done = True
            new = self._path.with_name("swapped")
            new.write_bytes(self._data)
            new.replace(self._path)
        elif os.path.abspath(name) == str(self._path):
            self._left -= 1


@pytest.fixture
def shared_folder(tmp_path: Path) -> Path:
    """A folder that everybody may write into."""
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)
    assert folder.stat().st_mode & stat.S_IWOTH
    return folder


@pytest.mark.parametrize("evil", ["another model", "a pickle"])
def test_what_was_checked_is_what_is_registered(home: Dispatcher, shared_folder: Path, evil: str) -> None:
    path = write_scaler(shared_folder / "m.onnx", 2.0)
    good = path.read_bytes()
    other = scaler(666.0).SerializeToString() if evil == "another model" else pickle.dumps("never read")
    with Swap(path, other) as swap:
        home.call("model.register", {"path": str(path)})
    assert swap.is_done
    assert path.read_bytes() == other
    opened = home.call("model.open", {"model": "m"})
    assert (Path(opened.folder) / "model.onnx").read_bytes() == good


def test_what_was_checked_is_what_is_compressed(home: Dispatcher, shared_folder: Path) -> None:
    path = write_scaler(shared_folder / "m.onnx", 2.0)
    rows = shared_folder / "rows.csv"
    rows.write_text("a,b,y\n" + "".join(f"{n},{n},{n % 2}\n" for n in range(50)))
    with Swap(path, b"\x80\x04N.") as swap:
        home.call("model.compress", {"path": str(path), "data": str(rows), "label": "y"})
    assert swap.is_done


def bundle_in(folder: Path, home: Dispatcher) -> tuple[Path, str]:
    """A registered bundle in a folder that others may write into, and its digest."""
    if not (folder / "m.onnx").exists():
        home.call("model.register", {"path": str(write_scaler(folder / "m.onnx"))})
    version = resolve_model(home.services, "m")
    place = folder / "bundle"
    for entry in home.services.blobs.tree(version.bundle.digest):
        (place / entry.path).parent.mkdir(parents=True, exist_ok=True)
        (place / entry.path).write_bytes(home.services.blobs.read(entry.digest))
    return place, version.bundle.digest


@pytest.mark.parametrize("name", ["model.onnx", "golden.json", "bundle.json", "manifest.json"])
def test_a_file_that_is_swapped_after_the_check_is_not_loaded(home: Dispatcher, shared_folder: Path, name: str) -> None:
    folder, digest = bundle_in(shared_folder, home)
    evil = (folder / name).read_bytes() + b" "  # which answers alike: only its digest tells
    if name == "model.onnx":
        other = scaler()
        other.doc_string = "another model of the same answers"
        evil = other.SerializeToString()
    runtime = OnnxRuntime(folder, expected_digest=digest)
    with Swap(folder / name, evil) as swap, pytest.raises(CorruptError):
        runtime.load()
    assert swap.is_done
    assert not runtime.is_ready


def test_a_pipe_in_the_place_of_a_file_does_not_hang(home: Dispatcher, shared_folder: Path) -> None:
    folder, digest = bundle_in(shared_folder, home)
    bundle = open_bundle(folder, expected_digest=digest)
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")
    with pytest.raises(CorruptError, match="no regular file"):
        bundle.model()
    (folder / "model.onnx").unlink()
    (folder / "model.onnx").symlink_to("/etc/passwd")
    with pytest.raises(CorruptError, match="cannot be read"):
        bundle.model()


# --------------------------------------------------------------------------- tampered, unsigned, downgraded


def doors(home: Dispatcher, tmp_path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every verb that loads a registered model."""
    yield "open", lambda: home.call("model.open", {"model": "m"})
    yield "export", lambda: home.call("model.export", {"model": "m", "to": str(tmp_path / "exported")})
    yield "deploy", lambda: home.call("endpoint.deploy", {"model": "m", "endpoint": "e"})
    yield "serve", lambda: list(home.stream("endpoint.serve", {"model": "m", "port": 0}))


def in_the_record(how: str, home: Dispatcher, old: ModelVersion, new: ModelVersion, stranger: HomeSigner) -> None:
    """Alter what the registry says of the newer version."""
    blobs = home.services.blobs
    signed = blobs.read(new.signature.digest) if new.signature else b""
    proofs = {"empty": b"", "stranger": stranger.sign(new.bundle.digest),
              "algorithm": signed.replace(b'"ed25519"', b'"none"')}  # fmt: skip
    fields: dict[str, Any] = {
        "unsigned": {"signature": None}, "older bundle": {"bundle": old.bundle},
        "older signature": {"signature": old.signature},
    }.get(how) or {"signature": blobs.put(proofs[how], media_type="application/json")}  # fmt: skip
    home.services.records.put(msgspec.structs.replace(new, **fields), expect_version=new.version)


def in_the_files(how: str, home: Dispatcher, old: ModelVersion, new: ModelVersion) -> None:
    """Alter what lies on the disk."""
    if how == "a blob":
        blobs = home.services.blobs
        digest = next(one.digest for one in blobs.tree(new.bundle.digest) if one.path == "model.onnx")
        path = blobs.path(digest)
        path.chmod(0o644)
        path.write_bytes(scaler(666.0).SerializeToString())
        return
    folder, other = open_version(home.services, new), open_version(home.services, old)
    for path in sorted(folder.glob("*.onnx" if how == "the graph" else "*.*")):
        path.unlink()
        path.write_bytes((other / path.name).read_bytes())


RECORD = ["unsigned", "empty", "stranger", "algorithm", "older bundle", "older signature"]


@pytest.mark.parametrize("how", [*RECORD, "a blob", "the graph", "the whole older bundle"])
def test_a_model_that_is_not_what_was_signed_is_opened_by_no_verb(home: Dispatcher, tmp_path: Path, how: str) -> None:
    """Tampered, unsigned, or an older version in the place of the newer one; a weaker algorithm."""
    for factor in (1.0, 2.0):
        home.call("model.register", {"path": str(write_scaler(tmp_path / "m.onnx", factor))})
    old, new = (resolve_model(home.services, f"m@{number}") for number in (1, 2))
    if how in RECORD:
        in_the_record(how, home, old, new, HomeSigner(tmp_path / "stranger"))
    else:
        in_the_files(how, home, old, new)
    for door, use in doors(home, tmp_path):
        with pytest.raises(MillraceError) as refused:
            use()
        code = refused.value.code
        assert code in ("artifact.corrupt", "artifact.untrusted", "record.conflict"), (door, refused.value)
    assert not (tmp_path / "exported").exists()
    assert home.call("endpoint.list", {}) == []
