"""A bundle is the same bytes every time, and nothing that was changed is opened."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from millrace.core.errors import CorruptError, InputError, NotFoundError, UntrustedError
from millrace.core.ids import digest_bytes
from millrace.formats.bundle import BundleContents, open_bundle, write_bundle
from millrace.formats.signature import Signature, TensorSpec


@pytest.fixture
def contents(tmp_path: Path) -> BundleContents:
    (tmp_path / "base.onnx").write_bytes(b"base")
    (tmp_path / "small.onnx").write_bytes(b"small")
    signature = Signature(
        task="classification",
        inputs=[
            TensorSpec(name="x", dtype="float32", shape=[-1, 2]),
            TensorSpec(name="c", dtype="string", shape=[-1, 1]),
        ],
        outputs=[TensorSpec(name="probabilities", dtype="float32", shape=[-1, 2])],
        label="y",
        classes=["a", "b"],
    )
    golden = {
        "inputs": {"x": np.array([[1.5, np.nan]], np.float32), "c": np.array([["word"]], object)},
        "outputs": {"probabilities": np.array([[1 / 3, 2 / 3]], np.float32)},
    }
    return BundleContents(
        model=tmp_path / "base.onnx", variants={"int8-static": tmp_path / "small.onnx"}, signature=signature,
        metrics=[], lineage={"dataset": "sha256:1"}, guarantees={"int8-static": {"bound": 0.01}, "gone": {}},
        reference={}, golden=golden,
    )  # fmt: skip


class OneKey:
    """Trusts one document."""

    def verify(self, digest: str, signature: bytes) -> str:
        if signature != b"signed " + digest.encode():
            raise UntrustedError("no trusted key")
        return "key"


def test_the_same_contents_are_the_same_bytes(tmp_path: Path, contents: BundleContents) -> None:
    first = write_bundle(tmp_path / "one", contents)
    assert write_bundle(tmp_path / "two", contents) == first
    bundle = open_bundle(tmp_path / "one", expected_digest=first)
    assert bundle.variants == ["fp32", "int8-static"]
    assert bundle.info.guarantees == {"int8-static": {"bound": 0.01}}
    golden = bundle.golden
    np.testing.assert_array_equal(golden.inputs["x"], contents.golden["inputs"]["x"])
    np.testing.assert_array_equal(golden.outputs["probabilities"], contents.golden["outputs"]["probabilities"])
    assert golden.inputs["c"].tolist() == [["word"]]
    assert bundle.model_path("int8-static").read_bytes() == b"small"
    with pytest.raises(NotFoundError, match="no variant 'gone'"):
        bundle.model_path("gone")


@pytest.mark.parametrize(
    "name", ["model.onnx", "variants/int8-static.onnx", "bundle.json", "reference.json", "golden.json"]
)
def test_a_changed_or_missing_file_is_named(tmp_path: Path, contents: BundleContents, name: str) -> None:
    write_bundle(tmp_path / "b", contents)
    path = tmp_path / "b" / name
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptError, match=name):
        open_bundle(tmp_path / "b")
    path.unlink()
    with pytest.raises(CorruptError, match=f"{name} of the bundle is missing"):
        open_bundle(tmp_path / "b")


def test_what_the_manifest_does_not_name_is_refused(tmp_path: Path, contents: BundleContents) -> None:
    write_bundle(tmp_path / "b", contents)
    (tmp_path / "b" / "extra.pkl").write_bytes(b"x")
    with pytest.raises(CorruptError, match=r"extra\.pkl is not part"):
        open_bundle(tmp_path / "b")
    (tmp_path / "b" / "extra.pkl").unlink()
    (tmp_path / "b" / "link").symlink_to("/etc/passwd")
    with pytest.raises(CorruptError, match="not a plain file"):
        open_bundle(tmp_path / "b")


def test_a_consistently_altered_bundle_has_another_digest(tmp_path: Path, contents: BundleContents) -> None:
    digest = write_bundle(tmp_path / "b", contents)
    (tmp_path / "base.onnx").write_bytes(b"evil")
    write_bundle(tmp_path / "evil", contents)
    with pytest.raises(CorruptError, match="want sha256"):
        open_bundle(tmp_path / "evil", expected_digest=digest)


def test_unsigned_and_foreign_signatures_are_refused(tmp_path: Path, contents: BundleContents) -> None:
    digest = write_bundle(tmp_path / "b", contents)
    assert open_bundle(tmp_path / "b", b"signed " + digest.encode(), OneKey()).signed_by == "key"
    for signature in (None, b"signed something else"):
        with pytest.raises(UntrustedError):
            open_bundle(tmp_path / "b", signature, OneKey())


def reseal(folder: Path) -> None:
    """What a forger does: change a file, then write a manifest that fits."""
    entries = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            data = path.read_bytes()
            name = path.relative_to(folder).as_posix()
            entries.append({"path": name, "digest": digest_bytes(data), "size_bytes": len(data)})
    (folder / "manifest.json").write_bytes(msgspec.json.encode(entries))


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "gone", "fp32", "int8-static/../../../outside"])
def test_a_variant_that_leads_out_of_the_bundle_is_refused(tmp_path: Path, contents: BundleContents, name: str) -> None:
    write_bundle(tmp_path / "b", contents)
    (tmp_path / "outside.onnx").write_bytes(b"evil")
    info = msgspec.json.decode((tmp_path / "b" / "bundle.json").read_bytes())
    (tmp_path / "b" / "bundle.json").write_bytes(msgspec.json.encode({**info, "variants": [name]}))
    reseal(tmp_path / "b")
    with pytest.raises(CorruptError, match="holds no such file"):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize("name", ["model.onnx", "bundle.json", "reference.json", "golden.json"])
def test_a_bundle_without_a_part_is_refused_although_its_manifest_fits(
    tmp_path: Path, contents: BundleContents, name: str
) -> None:
    write_bundle(tmp_path / "b", contents)
    (tmp_path / "b" / name).unlink()
    reseal(tmp_path / "b")
    with pytest.raises(CorruptError, match=name):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize(
    "golden",
    [
        b"[]",
        b"{",
        b'{"inputs":{},"outputs":{"y":{"dtype":"object","shape":[1],"values":[1]}}}',
        b'{"inputs":{},"outputs":{"y":{"dtype":"float32","shape":[7],"values":[1]}}}',
        b'{"inputs":{},"outputs":{"y":{"dtype":"float32","shape":[-1],"values":[1]}}}',
        b'{"inputs":{},"outputs":{"y":{"dtype":"float32","shape":[1],"values":["word"]}}}',
    ],
)
def test_golden_answers_that_are_no_arrays_are_refused_by_name(
    tmp_path: Path, contents: BundleContents, golden: bytes
) -> None:
    write_bundle(tmp_path / "b", contents)
    (tmp_path / "b" / "golden.json").write_bytes(golden)
    reseal(tmp_path / "b")
    with pytest.raises(CorruptError, match=r"golden\.json"):
        _ = open_bundle(tmp_path / "b").golden


@pytest.mark.parametrize("name", ["../x", "fp32", "a/b", "", "ß", "-x"])
def test_a_variant_needs_a_plain_name(tmp_path: Path, contents: BundleContents, name: str) -> None:
    bad = msgspec.structs.replace(contents, variants={name: tmp_path / "small.onnx"})
    with pytest.raises(InputError, match="cannot be named"):
        write_bundle(tmp_path / "b", bad)


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        open_bundle(tmp_path)
