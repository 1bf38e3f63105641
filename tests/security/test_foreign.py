"""Files of models that come from elsewhere: one known format is taken, everything else is refused and never run.

Where each attack comes from: CWE-502 and the pickles of PyTorch, joblib and NumPy (CVE-2025-1716 and the "nullifAI"
files of 2025: archives with wrong checksums or another compression pass scanners, and load); CWE-409 for bombs;
CWE-59 for links.
"""

from __future__ import annotations

import asyncio
import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import joblib
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from millrace.api.app import build_app
from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.control.dispatch import Dispatcher
from millrace.core.errors import CorruptError, DataError, InputError, MillraceError, UntrustedError
from millrace.core.types import Artifact, ModelVersion
from millrace.data.images import read_npz
from millrace.data.tables import read_bytes
from millrace.formats.mlflow.plain_files import PlainFiles
from millrace.formats.mlflow.source import Problems
from millrace.store.trees import put_files
from millrace.testing.graphs import write_scaler
from millrace.wiring import open_dispatcher, open_transport

EXTENSIONS = (".onnx", ".pt", ".safetensors")


class Canary:
    """Whoever unpickles it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return (os.mkdir, (self.path,))


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path / "home"))
    yield opened
    opened.close()


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that must not come to be; Python's unpicklers refuse to be called at all."""
    path = tmp_path / "canary"

    def called(*_: object, **__: object) -> None:
        raise AssertionError("something was unpickled")

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, called)
    monkeypatch.setattr(torch, "load", called)
    yield path
    assert not path.exists(), "a pickle was run"


# --------------------------------------------------------------------------- pickles and archives


def test_the_canary_is_one(tmp_path: Path) -> None:
    """Whoever unpickled it would be found out."""
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def zipped(data: bytes, name: str = "archive/data.pkl", compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr(name, data)
    return stream.getvalue()


def tarred(*members: tarfile.TarInfo, data: bytes = b"") -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for member in members:
            archive.addfile(member, io.BytesIO(data) if member.size else None)
    return stream.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def saved(write: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    write(stream)
    return stream.getvalue()


def sparse_tar() -> bytes:
    """A member of a terabyte that holds one block."""
    info = member("hole", size=512)
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "hole",
                        "GNU.sparse.size": str(1 << 40), "GNU.sparse.map": f"{(1 << 40) - 512},512"}  # fmt: skip
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(info, io.BytesIO(b"x" * 512))
    return stream.getvalue()


def bad_crc(data: bytes) -> bytes:
    packed = bytearray(zipped(data))
    packed[14:18] = b"\0\0\0\0"  # of the local header
    at = packed.index(b"PK\x01\x02")
    packed[at + 16 : at + 20] = b"\0\0\0\0"  # of the directory
    return bytes(packed)


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def hostile_files(canary: Path) -> dict[str, bytes]:
    """Everything that is not ONNX, by what it is."""
    trap = Canary(canary)
    raw = pickle.dumps(trap)
    array = np.empty(1, dtype=object)
    array[0] = trap
    files = {f"pickle of protocol {protocol}": pickle.dumps(trap, protocol) for protocol in range(6)}
    files |= {
        "torch.save": saved(lambda to: torch.save({"weights": trap}, to)),
        "torch.save of old": saved(lambda to: torch.save({"a": trap}, to, _use_new_zipfile_serialization=False)),
        "zip": zipped(raw), "zip with a wrong checksum": bad_crc(raw), "zip in a zip": zipped(zipped(raw), "inner.zip"),
        "deflated zip": zipped(raw, compression=zipfile.ZIP_DEFLATED), "zip of lzma": zipped(raw, compression=zipfile.ZIP_LZMA),
        "zip in gzip": gzip.compress(zipped(raw)), "gzip in gzip": gzip.compress(gzip.compress(raw)),
        "gzip": gzip.compress(raw), "bz2": bz2.compress(raw), "xz": lzma.compress(raw), "zlib": zlib.compress(raw),
        "lzma": lzma.compress(raw, format=lzma.FORMAT_ALONE), "zlib 9": zlib.compress(raw, 9), "zlib 0": zlib.compress(raw, 0),
        "zip behind a head": b"#!/bin/sh\n" + zipped(raw), "zip bomb": zipped(bytes(50 << 20), compression=zipfile.ZIP_DEFLATED),
        "gzip bomb": gzip.compress(bytes(50 << 20)), "npy of objects": saved(lambda to: np.save(to, array, allow_pickle=True)),
        "npz of objects": saved(lambda to: np.savez(to, x=array)), "tar": tarred(member("data.pkl", size=len(raw)), data=raw),
        "tar with a link": tarred(member("model.onnx", tarfile.SYMTYPE, "/etc/passwd")),
        "tar with a hard link": tarred(member("model.onnx", tarfile.LNKTYPE, "../../etc/passwd")),
        "sparse tar": sparse_tar(), "tar in gzip": gzip.compress(sparse_tar()),
        "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(64), "onnxruntime's own": b"\x18\0\0\0ORTM" + bytes(64),
        "safetensors": safetensors(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "safetensors without an end": safetensors(b"{}", length=(1 << 63) - 1), "nothing": b"", "a text": b"hello\n",
        "zeros": bytes(4096), "a script": b"#!/bin/sh\ntouch canary\n", "XML": b"<?xml version='1.0'?><net/>",
    }  # fmt: skip
    for way in ("zlib", "gzip", "bz2", "lzma", "xz"):
        packing: Any = (way, 3)  # its annotation knows whole numbers alone
        files[f"joblib with {way}"] = saved(lambda to, packing=packing: joblib.dump(trap, to, compress=packing))
    files["joblib"] = saved(lambda to: joblib.dump(trap, to))
    return files


def everything(folder: Path) -> dict[str, bytes]:
    """Regular files below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_whatever_is_not_onnx_is_refused_under_every_extension(home: Dispatcher, tmp_path: Path, canary: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("a,b,y\n" + "1,2,0\n" * 20)
    home.call("model.list", {})
    for what, data in hostile_files(canary).items():
        for extension in EXTENSIONS:
            path = tmp_path / f"model{extension}"
            path.write_bytes(data)
            for door, body in (("model.register", {}), ("model.compress", {"data": str(rows), "label": "y"})):
                with pytest.raises(MillraceError) as refused:
                    home.call(door, {"path": str(path), **body})
                assert refused.value.code == "input.invalid", (what, door, refused.value)
                assert refused.value.hint, what
    assert home.call("model.list", {}) == []
    assert list(home.services.blobs.list()) == []
    left = {Path(name).name for name in everything(tmp_path / "home")}
    assert {name for name in left if not name.startswith(("records", "signing"))} == set()
    assert not list(tmp_path.glob("*variants*"))


def test_an_upload_is_refused_like_a_path_and_stays_a_file_of_bytes(
    home: Dispatcher, tmp_path: Path, canary: Path
) -> None:
    data = pickle.dumps(Canary(canary))
    (tmp_path / "weights.onnx").write_bytes(data)
    stored = home.call("blob.put", {"path": str(tmp_path / "weights.onnx")})
    with pytest.raises(InputError, match="a pickle"):
        home.call("model.register", {"path": f"blob:{stored.digest}/weights.onnx"})
    assert home.services.blobs.read(stored.digest) == data
    assert home.call("model.list", {}) == []


def test_the_command_says_it_in_one_line(tmp_path: Path, canary: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(pickle.dumps(Canary(canary)))
    arguments = ["--home", str(tmp_path / "home"), "models", "register", str(tmp_path / "m.onnx")]
    done = CliRunner().invoke(cli, arguments, obj=Session(open_transport), prog_name="millrace")
    assert done.exit_code == 2
    assert done.stderr.splitlines()[0] == "error: m.onnx is a pickle, which runs code when it is loaded; want ONNX"
    assert "Traceback" not in done.stderr


def test_what_was_logged_as_it_is_is_never_loaded(home: Dispatcher, tmp_path: Path, canary: Path) -> None:
    """A model that MLflow logged is a folder of bytes, even when it looks like a bundle: no verb opens it."""
    (tmp_path / "logged").mkdir()
    (tmp_path / "logged/model.pkl").write_bytes(pickle.dumps(Canary(canary)))
    (tmp_path / "logged/manifest.json").write_text("[]")
    write_scaler(tmp_path / "logged/model.onnx")
    tree = home.services.blobs.put_tree(tmp_path / "logged")
    home.services.records.put(ModelVersion(id="v", name="m", number=1, bundle=tree, format="opaque", chosen_variant=""))
    for door, body in (
        ("model.open", {"model": "m"}), ("model.export", {"model": "m", "to": str(tmp_path / "out")}),
        ("endpoint.deploy", {"model": "m", "endpoint": "e"}),
    ):  # fmt: skip
        with pytest.raises((InputError, CorruptError, UntrustedError)):
            home.call(door, body)
    with pytest.raises((CorruptError, UntrustedError)):
        list(home.stream("endpoint.serve", {"model": "m", "port": 0}))
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------- archives of data


def test_a_bomb_is_not_unpacked_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.data.tables.LARGEST_UNPACKED_BYTES", 1 << 20)
    bomb = tmp_path / "rows.csv.gz"
    bomb.write_bytes(gzip.compress(gzip.compress(b"a,b\n" * (1 << 20)) + bytes(8 << 20)))
    with pytest.raises(DataError, match="unpacks to more than"):
        read_bytes(bomb, "rows.csv.gz")
    good = tmp_path / "good.csv.gz"
    good.write_bytes(gzip.compress(b"a,b\n" * 1000))
    assert read_bytes(good, "good") == b"a,b\n" * 1000
    np.savez_compressed(tmp_path / "bomb.npz", x=np.zeros((1 << 22, 2)), y=np.zeros(1 << 22))
    with pytest.raises(DataError, match="unpacks to"):
        read_npz(tmp_path / "bomb.npz", "bomb.npz")


@pytest.mark.parametrize(
    ("name", "pack"),
    [("rows.csv", gzip.compress), ("rows.csv", zlib.compress), ("rows.jsonl", gzip.compress), ("rows.csv", zipped),
     ("rows.csv.gz", lambda data: gzip.compress(gzip.compress(data))), ("rows.parquet", pickle.dumps)],
)  # fmt: skip
def test_rows_beside_a_model_are_not_unpacked_unasked(
    home: Dispatcher, tmp_path: Path, canary: Path, name: str, pack: Callable[[bytes], bytes]
) -> None:
    write_scaler(tmp_path / "m.onnx")
    (tmp_path / name).write_bytes(pack(b"a,b,y\n" + b"1,2,0\n2,1,1\n" * 20))
    with pytest.raises(DataError, match="want a table"):
        home.call("model.register", {"path": str(tmp_path / "m.onnx"), "data": str(tmp_path / name), "label": "y"})
    assert home.call("model.list", {}) == []


def test_rows_in_gzip_are_read_up_to_a_bound(home: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv.gz").write_bytes(gzip.compress(b"a,b,y\n" + b"1,2,0\n2,1,1\n" * 20_000))
    body = {"path": str(write_scaler(tmp_path / "m.onnx")), "data": str(tmp_path / "rows.csv.gz"), "label": "y"}
    assert home.call("model.register", body).version == 1
    monkeypatch.setattr("millrace.data.tables.LARGEST_UNPACKED_BYTES", 1000)
    with pytest.raises(DataError, match="unpacks to more than"):
        home.call("model.register", body)


def test_archives_stay_bytes_at_every_door_that_takes_files(home: Dispatcher, tmp_path: Path, canary: Path) -> None:
    """What is uploaded is kept as it came: by path, by HTTP, by MLflow's protocol. Nothing is unpacked anywhere."""
    run = home.call("run.track", {"name": "r", "project": "default"}).id
    app = build_app(home)

    async def send(data: bytes) -> list[bytes]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            place = f"/api/2.0/mlflow-artifacts/artifacts/1/{run}/artifacts/model.zip"
            sent = [await client.put(place, content=data), await client.post("/api/v1/blobs", content=data)]
            assert [answer.status_code for answer in sent] == [200, 200], [answer.text for answer in sent]
            digest = sent[1].json()["digest"]
            return [(await client.get(url)).content for url in (place, f"/api/v1/blobs/{digest}")]

    for what, data in hostile_files(canary).items():
        (tmp_path / "sent").write_bytes(data)
        home.call("run.artifact", {"run": run, "name": "sent", "path": str(tmp_path / "sent")})
        assert asyncio.run(send(data)) == [data, data], what
        stored = home.call("blob.put", {"path": str(tmp_path / "sent")})
        assert home.services.blobs.read(stored.digest) == data
    kept = {one.size_bytes for one in home.services.blobs.list()}
    assert kept <= {len(data) for data in hostile_files(canary).values()}, "something was unpacked"


@pytest.mark.parametrize("what", ["objects", "crc", "nested", "liar", "pickle", "link"])
def test_arrays_are_read_without_pickle_and_without_belief(tmp_path: Path, canary: Path, what: str) -> None:
    trap = np.empty(2, dtype=object)
    trap[:] = [Canary(canary), Canary(canary)]
    good = saved(lambda to: np.save(to, np.zeros((2, 3))))
    huge = good.replace(b"(2, 3)", b"(2, 1000000000000000)").replace(b" " * 17 + b"\n", b"\n")
    data = {
        "objects": saved(lambda to: np.savez(to, x=trap, y=np.zeros(2))), "crc": bad_crc(b"x" * 100),
        "nested": zipped(zipped(good, "x.npy"), "x.npy"), "liar": zipped(huge, "x.npy"),
        "pickle": pickle.dumps(trap[0]), "link": zipped(b"/etc/passwd", "../../x.npy"),
    }[what]  # fmt: skip
    (tmp_path / "a.npz").write_bytes(data)
    with pytest.raises(DataError):
        read_npz(tmp_path / "a.npz", "a.npz")
    assert [path.name for path in tmp_path.rglob("*")] == ["a.npz"]


@pytest.mark.parametrize("way", ["symbolic link", "hard link", "pipe", "link to a folder"])
def test_an_imported_folder_leads_nowhere(tmp_path: Path, home: Dispatcher, way: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    run = tmp_path / "mlruns/0/" / ("a" * 32)
    (run / "artifacts").mkdir(parents=True)
    (run / "meta.yaml").write_text(f"run_id: {'a' * 32}\nstatus: 3\nstart_time: 1\n")
    (tmp_path / "mlruns/0/meta.yaml").write_text("name: Default\nexperiment_id: 0\n")
    (run / "artifacts/good.txt").write_text("good")
    target = run / "artifacts/bad"
    if way == "hard link":
        os.link(tmp_path / "outside/secret", target)
    elif way == "pipe":
        os.mkfifo(target)
    else:
        target.symlink_to(tmp_path / ("outside/secret" if way == "symbolic link" else "outside"))
    told = list(home.stream("system.import_mlflow", {"source": str(tmp_path / "mlruns")}))
    kept = {home.services.blobs.read(one.digest) for one in home.services.blobs.list()}
    assert b"good" in kept
    assert b"secret" not in kept
    assert "bad" in repr(told)


def test_a_folder_with_links_is_no_tree(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="symbolic link"):
        put_files(tmp_path / "folder", lambda path: Artifact(digest="", size_bytes=0))
    files = PlainFiles(Problems())
    with pytest.raises(OSError, match="Too many levels"):
        files.open(tmp_path / "folder/link")
