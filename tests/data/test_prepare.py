"""The stage: determinism, roles, tasks, expectations, formats."""

from __future__ import annotations

import io
import struct

import numpy as np
import polars as pl
import pytest
from PIL import Image

from millrace.core.errors import CorruptError, DataError
from millrace.core.ports import StageDescriptor
from millrace.core.spec import Data, Spec
from millrace.data import DATA
from millrace.data.prepare import prepare
from millrace.data.source_files import source_digests
from millrace.formats.dataset import open_dataset

MIXED = "id,age,plan,note,day,flag,y\n" + "".join(
    f"c{i},{i % 50 + 18},{'abc'[i % 3]},{'' if i % 4 else 'a remark of some length that nobody will ever learn from'},"
    f"2024-0{i % 9 + 1}-01,{'yes' if i % 2 else 'no'},{'stay' if i % 5 else 'leave'}\n"
    for i in range(200)
)


def roles(reader) -> dict[str, tuple[str, str]]:
    return {column.name: (column.type, column.role) for column in reader.manifest.columns}


def test_descriptor_names_the_function():
    assert isinstance(DATA, StageDescriptor)
    assert DATA.implementation == f"{prepare.__module__}:{prepare.__name__}"
    assert DATA.uses_source


def test_types_and_roles_of_a_strangers_table(project):
    project.write("t.csv", MIXED)
    facts, reader = project.run()
    assert roles(reader) == {
        "id": ("category", "id"),
        "age": ("number", "feature"),
        "plan": ("category", "feature"),
        "note": ("ignore", "ignored"),
        "day": ("ignore", "ignored"),
        "flag": ("category", "feature"),
        "y": ("category", "label"),
    }
    assert facts["classes"] == {"leave": 40, "stay": 160}
    assert [spec.name for spec in reader.signature_inputs()] == ["numbers", "categories"]
    assert [spec.columns for spec in reader.signature_inputs()] == [["age"], ["plan", "flag"]]
    assert len(facts["warnings"]) == 3


def test_overrides_win(project):
    project.write("t.csv", MIXED)
    _, reader = project.run(
        types={"age": "category", "flag": "boolean", "id": "category"}, ignore=["plan", "d*", "note"]
    )
    found = roles(reader)
    assert found["age"] == ("category", "feature")
    assert found["flag"] == ("boolean", "feature")
    assert found["id"] == ("category", "feature")
    assert found["plan"] == ("ignore", "ignored")
    assert reader.manifest.features("number", "boolean") == ["flag"]


def test_same_input_same_bytes_and_a_changed_cell_changes_them(project):
    from_run = lambda: [p.read_bytes() for p in sorted(project.run()[1].folder.rglob("*.*"))]  # noqa: E731
    project.write("t.csv", MIXED)
    first, second = from_run(), from_run()
    assert first == second
    digest = project.run()[0]["content_digest"]
    project.write("t.csv", MIXED.replace("c7,25", "c7,26"))
    assert project.run()[0]["content_digest"] != digest


def test_a_killed_attempt_leaves_nothing_behind(project):
    project.write("t.csv", MIXED)
    leftover = project.folder / ".work1" / "scratch" / "dataset" / "train" / "part-00099.parquet"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    _, reader = project.run()
    assert not (reader.folder / "train" / "part-00099.parquet").exists()


@pytest.mark.parametrize(
    ("labels", "task", "kind"),
    [
        (["0", "1"], "classification", "integer"),
        (["a", "b", "c"], "classification", "string"),
        (["1.5", "2.5", "3.25"], "regression", "number"),
        ([str(i) for i in range(60)], "regression", "number"),
        ([str(i) for i in range(10)], "classification", "integer"),
    ],
)
def test_task_by_the_label(project, labels, task, kind):
    project.write("t.csv", "a,y\n" + "".join(f"{i % 17},{labels[i % len(labels)]}\n" for i in range(240)))
    facts, reader = project.run()
    assert (facts["task"], reader.manifest.label_type) == (task, kind)
    if task == "regression":
        assert sum(facts["label_histogram"]["counts"]) == 240
        assert reader.labels("train").dtype == np.float32


def test_expectations_are_all_listed_or_warned(project):
    project.write("t.csv", MIXED)
    expect = {
        "rows": ">=1000",
        "classes": 3,
        "unique": "plan",
        "not_null": "note",
        "columns": ["agee"],
        "max_rejected": "1%",
    }
    with pytest.raises(DataError) as caught:
        project.run(expect=expect)
    assert len(caught.value.details["broken"]) == 5
    for words in ("want >=1000, got 200", "want 3, got 2", "did you mean 'age'", "150 missing"):
        assert words in caught.value.message
    facts, _ = project.run(expect=expect | {"action": "warn"})
    assert sum(warning.startswith("expectation not met") for warning in facts["warnings"]) == 5
    project.run(expect={"rows": 200, "classes": "2", "unique": "id", "not_null": "age", "columns": ["age"]})
    with pytest.raises(DataError, match=r"expect\.rows"):
        project.run(expect={"rows": "many"})


def test_json_lines_and_parquet_agree_with_csv(project):
    rows = [{"a": i % 17, "c": "uv"[i % 2], "b": i % 3 == 0, "y": i % 2} for i in range(80)]
    pl.DataFrame(rows).write_parquet(project.folder / "t.parquet")
    pl.DataFrame(rows).write_ndjson(project.folder / "t.jsonl")
    pl.DataFrame(rows).write_csv(project.folder / "t.csv")
    parquet, lines = project.run(source="t.parquet"), project.run(source="t.jsonl")
    assert parquet[0]["content_digest"] == lines[0]["content_digest"]
    assert roles(parquet[1])["b"] == ("boolean", "feature")
    assert parquet[1].arrays("test")["numbers"].shape[1] == 2
    assert roles(project.run()[1])["b"] == ("category", "feature")


def test_csv_of_other_delimiters_and_a_byte_order_mark(project):
    want = (
        project.write("t.csv", "a,c,y\n" + "".join(f'{i % 7},"u;{i % 2}",{i % 2}\n' for i in range(40)))
        and project.run()[0]
    )
    for mark in (";", "\t", "|"):
        body = "".join(f'{i % 7}{mark}"u;{i % 2}"{mark}{i % 2}\r\n' for i in range(40))
        project.write("t.csv", f"\ufeffa{mark}c{mark}y\r\n{body}")
        assert project.run()[0]["content_digest"] == want["content_digest"]


def idx(values: np.ndarray) -> bytes:
    return struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def test_idx_pairs_keep_their_split(project):
    random = np.random.default_rng(0)
    for name, rows in (("train", 60), ("t10k", 20)):
        project.write(f"d/{name}-images-idx3-ubyte", idx(random.integers(0, 256, (rows, 4, 5), dtype=np.uint8)))
        project.write(f"d/{name}-labels-idx1-ubyte", idx((np.arange(rows) % 3).astype(np.uint8)))
    facts, reader = project.run(source="d", label="kind")
    assert facts["split"]["test"] == 20
    assert facts["image"] == [4, 5]
    assert reader.arrays("test")["pixels"].shape == (20, 20)
    assert len(reader.manifest.image_columns) == 20
    assert len(reader.rows("test", [0, 3])[1]["pixels"]) == 20
    assert set(source_digests(Data(source="d/train-images-idx3-ubyte", label="kind"), project.folder)) == {
        "d/train-images-idx3-ubyte",
        "d/train-labels-idx1-ubyte",
    }
    (project.folder / "d" / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match="train-labels-idx1-ubyte"):
        project.run(source="d/train-images-idx3-ubyte", label="kind")


def test_npz_of_images_and_of_numbers(project):
    random = np.random.default_rng(1)
    images, labels = random.random((60, 3, 3, 3)).astype(np.float32), np.arange(60) % 2
    np.savez(project.folder / "t.npz", x=images, y=labels)
    _, reader = project.run(source="t.npz")
    assert reader.manifest.image == [3, 3, 3]
    stacked = np.concatenate([reader.arrays(s)["pixels"] for s in reader.manifest.splits])
    assert sorted(map(tuple, stacked)) == sorted(map(tuple, images.reshape(60, 27)))
    np.savez(project.folder / "t.npz", x=random.random((60, 4)), y=labels)
    assert project.run(source="t.npz")[1].arrays("train")["numbers"].shape[1] == 4
    np.savez(project.folder / "t.npz", x=np.array([{}], dtype=object), y=labels)
    with pytest.raises(DataError, match=r"not an \.npz file"):
        project.run(source="t.npz")


def test_image_folders(project):
    for index in range(60):
        label, stream = "cat" if index % 2 else "dog", io.BytesIO()
        Image.new("RGB", (6, 5), (index, 2 * index, 255 * (index % 2))).save(stream, "PNG")
        project.write(f"photos/{label}/{index:02d}.png", stream.getvalue())
    project.write("photos/README.txt", "not an image")
    facts, reader = project.run(source="photos", label="animal", format="images")
    assert facts["classes"] == {"cat": 30, "dog": 30}
    assert facts["image"] == [5, 6, 3]
    _, reader = project.run(source="photos", label="animal", format="images", image={"shape": [4, 4]})
    assert reader.arrays("test")["pixels"].shape[1] == 16
    project.write("photos/cat/broken.png", b"\x89PNG no")
    with pytest.raises(DataError, match=r"photos/cat/broken.png is not an image"):
        project.run(source="photos", label="animal", format="images")


def test_image_shape_must_fit(project):
    project.write("t.csv", "p0,p1,p2,y\n" + "1,2,3,a\n4,5,6,b\n" * 20)
    with pytest.raises(DataError, match="wants 4 columns"):
        project.run(image={"columns": "p*", "shape": [2, 2]})


def test_missing_pixels_are_rejected(project):
    project.write("t.csv", "p0,p1,y\n" + "".join(f"{i},{'' if i == 3 else i * 2},{'ab'[i % 2]}\n" for i in range(40)))
    facts, _ = project.run(image={"columns": "p*", "shape": [1, 2]})
    assert facts["rejected_by_reason"] == {"missing": 1}


def test_statistics_are_of_training_rows(project):
    project.write("t.csv", "a,c,y\n" + "".join(f"{i * 1.5},{'uv'[i % 2]},{'ab'[i % 2]}\n" for i in range(90)))
    _, reader = project.run()
    numbers = reader.arrays("train")["numbers"][:, 0].astype(np.float64)
    column = reader.manifest.columns[0]
    assert column.mean == pytest.approx(numbers.mean())
    assert column.sd == pytest.approx(numbers.std())


def test_no_data_section(project, tmp_path):
    with pytest.raises(DataError, match="no data section"):
        prepare(Spec(), None)  # type: ignore[arg-type]


def test_part_that_is_missing_or_altered(project):
    project.write("t.csv", MIXED)
    _, reader = project.run()
    part = reader.folder / reader.manifest.splits["test"][0].path
    part.write_bytes(b"PAR1")
    with pytest.raises(CorruptError, match=r"part-00000\.parquet cannot be read"):
        open_dataset(reader.folder).arrays("test")
