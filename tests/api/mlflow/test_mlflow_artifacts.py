"""Files through MLflow's routes: up, down, lists, parts; nothing leaves its folder."""

from __future__ import annotations

import http.client
import os
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.api.mlflow import files, limits
from millrace.core.errors import InputError
from millrace.core.types import ArtifactFile, Run, Step

FILES = "/api/2.0/mlflow-artifacts"
INVALID = (400, "INVALID_PARAMETER_VALUE")
GONE = (404, "RESOURCE_DOES_NOT_EXIST")


def raw(api: Any, method: str, path: str, data: bytes | None = None) -> tuple[int, bytes]:
    """A request whose path nobody normalises on the way."""
    with closing(http.client.HTTPConnection(api.http.base_url.host, api.http.base_url.port, timeout=60)) as connection:
        connection.request(method, path, data)
        response = connection.getresponse()
        return response.status, response.read()


@pytest.fixture
def place(api: Any) -> tuple[Any, str, str]:
    """A run, and where its files are."""
    experiment = api.experiment()
    run = api.run(experiment)
    return api, run, f"{FILES}/artifacts/{experiment}/{run}/artifacts"


def test_files_come_back_as_they_were_sent(place: tuple[Any, str, str]) -> None:
    api, run, root = place
    sent = {"a.txt": b"hello", "d/ä b.bin": os.urandom(3_000_000), "d/e/empty": b""}
    for name, data in sent.items():
        assert api.http.put(f"{root}/{name}", content=data).json() == {}
    for name, data in sent.items():
        answer = api.http.get(f"{root}/{name}")
        assert answer.content == data
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-disposition"].startswith("attachment")
    assert api.http.get(f"{root}/a.txt", headers={"Range": "bytes=1-2"}).content == b"el"
    assert api.http.get("/get-artifact", params={"run_uuid": run, "path": "a.txt"}).content == b"hello"
    api.http.put(f"{root}/a.txt", content=b"other")
    assert api.http.get(f"{root}/a.txt").content == b"other"
    assert api.http.get(f"{root}/nope").status_code == 404


def test_lists_show_one_level(place: tuple[Any, str, str]) -> None:
    api, run, root = place
    for name in ("a", "d/b", "d/e/c"):
        api.http.put(f"{root}/{name}", content=name.encode())
    found = api.get("/artifacts/list", run_id=run)
    assert found["root_uri"].endswith(f"/{run}/artifacts")
    assert found["files"] == [{"path": "a", "is_dir": False, "file_size": 1}, {"path": "d", "is_dir": True}]
    inside = api.get("/artifacts/list", run_id=run, path="d")["files"]
    assert [one["path"] for one in inside] == ["d/b", "d/e"]
    folder = root.partition("/artifacts/")[2] + "/d"
    proxied = api.http.get(f"{FILES}/artifacts", params={"path": folder}).json()["files"]
    assert [one["path"] for one in proxied] == ["b", "e"]
    assert api.get("/artifacts/list", run_id=run, path="a")["files"] == []


def test_files_and_folders_are_deleted(place: tuple[Any, str, str]) -> None:
    api, run, root = place
    for name in ("a", "d/b", "d/c", "dd"):
        api.http.put(f"{root}/{name}", content=b"x")
    for name in ("d", "a", "nothing"):
        assert api.http.delete(f"{root}/{name}").status_code == 200
    assert [one["path"] for one in api.get("/artifacts/list", run_id=run)["files"]] == ["dd"]


def test_a_file_cannot_be_a_folder(place: tuple[Any, str, str]) -> None:
    api, _, root = place
    api.http.put(f"{root}/a", content=b"x")
    assert api.http.put(f"{root}/a/b", content=b"x").status_code == 400


LEAVING = (
    "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/%252e%252e/%252e%252e/etc/passwd", "/..%2f..%2fetc/passwd",
    "//etc/passwd", "/%2fetc%2fpasswd", "/a/../b", "/a/./b", "/a//b", "/..%5c..%5cx", "/a%00b", "/%25252e%25252e/x",
    "/file:%2f%2f/etc", "/0/" + "a" * 32 + "/artifacts/%252e%252e/x",
)  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_no_path_leaves_its_folder(api: Any, method: str) -> None:
    for path in LEAVING:
        status, answer = raw(api, method, f"{FILES}/artifacts{path}", b"evil" if method == "PUT" else None)
        assert 400 <= status < 500, path
        assert b"root:" not in answer
        assert b"error_code" in answer, path
    assert api.services.records.find(ArtifactFile) == []


def test_no_list_leaves_its_folder(place: tuple[Any, str, str]) -> None:
    api, run, _ = place
    for path in ("..", "../..", "/etc", "%2e%2e/x", "a/../../b", "\\etc"):
        assert api.refused("GET", "/artifacts/list", run_id=run, path=path) == INVALID
        assert api.http.get(f"{FILES}/artifacts", params={"path": path}).status_code == 400


@given(st.text(max_size=40))
def test_a_safe_path_stays_below(path: str) -> None:
    try:
        safe = limits.safe_path(path)
    except InputError:
        return
    for form in (safe, limits.fully_unquoted(safe)):
        assert not form.startswith("/")
        assert ".." not in form.split("/")
        assert "\\" not in form


def test_an_upload_in_parts(place: tuple[Any, str, str]) -> None:
    api, _, root = place
    folder = root.partition("/artifacts/")[2]
    parts = [os.urandom(70_000) for _ in range(3)]
    body = {"path": "/home/ann/big.bin", "num_parts": 3}
    made = api.http.post(f"{FILES}/mpu/create/{folder}", json=body).json()
    tags = []
    for credential, part in zip(made["credentials"], parts, strict=True):
        answer = api.http.put(credential["url"], content=part)
        tags.append({"part_number": credential["part_number"], "etag": answer.headers["etag"]})
    ended = {"path": "/home/ann/big.bin", "upload_id": made["upload_id"], "parts": tags}
    wrong = {**ended, "parts": tags[:2]}
    assert api.http.post(f"{FILES}/mpu/complete/{folder}", json=wrong).status_code == 400
    assert api.http.post(f"{FILES}/mpu/complete/{folder}", json=ended).status_code == 200
    assert api.http.get(f"{root}/big.bin").content == b"".join(parts)
    assert api.http.post(f"{FILES}/mpu/complete/{folder}", json=ended).status_code == 400
    assert [file.path for file in api.services.records.find(ArtifactFile)] == ["big.bin"]


def test_an_aborted_upload_leaves_nothing(place: tuple[Any, str, str]) -> None:
    api, run, root = place
    folder = root.partition("/artifacts/")[2]
    made = api.http.post(f"{FILES}/mpu/create/{folder}", json={"path": "x", "num_parts": 1}).json()
    api.http.put(made["credentials"][0]["url"], content=b"part")
    assert api.http.post(f"{FILES}/mpu/abort/{folder}", json={"path": "x", "upload_id": made["upload_id"]}).is_success
    assert api.services.records.find(ArtifactFile) == []
    assert api.get("/artifacts/list", run_id=run)["files"] == []
    assert api.http.put(f"{FILES}/mpu/part/short/1", content=b"x").status_code == 404
    assert api.http.post(f"{FILES}/mpu/create/{folder}", json={"path": "x", "num_parts": 0}).status_code == 400


def test_a_client_that_goes_away_leaves_nothing(place: tuple[Any, str, str]) -> None:
    api, _, root = place
    connection = http.client.HTTPConnection(api.http.base_url.host, api.http.base_url.port, timeout=60)
    connection.putrequest("PUT", f"{root}/half")
    connection.putheader("Content-Length", "5000000")
    connection.endheaders()
    connection.send(b"x" * 3_000_000)
    connection.close()
    api.http.put(f"{root}/whole", content=b"x")
    assert api.http.get(f"{root}/half").status_code == 404
    assert [file.path for file in api.services.records.find(ArtifactFile)] == ["whole"]


def test_what_steps_made_can_be_had_too(api: Any) -> None:
    services = api.services
    single = services.blobs.put(b"onnx")
    folder = services.home / "made"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "x").write_bytes(b"xx")
    tree = services.blobs.put_tree(folder)
    run = services.records.put(Run(id="c" * 32, project="p", name="fit", state="succeeded"))
    outputs = {"onnx": single, "variants": tree}
    services.records.put(Step(id="d" * 32, run_id=run.id, name="export", stage="export", outputs=outputs))
    found = api.get("/artifacts/list", run_id=run.id, path="export")["files"]
    assert [(one["path"], one["is_dir"]) for one in found] == [("export/onnx", False), ("export/variants", True)]
    root = f"{FILES}/artifacts/1/{run.id}/artifacts/export"
    assert api.http.get(f"{root}/onnx").content == b"onnx"
    assert api.http.get(f"{root}/variants/sub/x").content == b"xx"


def test_owners_are_read_from_paths() -> None:
    run = "0123456789abcdef" * 2
    assert files.place_of(f"3/{run}/artifacts/a/b") == files.Place(owner=run, path="a/b")
    assert files.place_of(f"deep/er/models/m-{run}/artifacts") == files.Place(owner=f"m-{run}")
    assert files.place_of("free/file") == files.Place(owner="files", path="free/file")
    with pytest.raises(InputError):
        files.place_of(f"3/{run}/artifacts/../x")


def test_urls_of_the_store_are_not_given(place: tuple[Any, str, str]) -> None:
    api, run, _ = place
    assert api.refused("POST", "/artifacts/presigned-upload-url", run_id=run, path="a") == INVALID
    assert api.http.get(f"{FILES}/presigned/a/b").json()["error_code"] == "NOT_IMPLEMENTED"
