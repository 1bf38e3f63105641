"""Public data sets, as their authors wrote them."""

from __future__ import annotations

import pytest

from millrace.data.propose import propose


def test_adult(project, test_data):
    files = [str(test_data / "adult" / name) for name in ("train.parquet", "test.parquet")]
    facts, reader = project.run(source=files, label="income", clean=["drop_duplicates"])
    assert facts["rows_in"] == 48_842
    assert facts["rejected_by_reason"] == {"duplicate": 52}
    assert reader.manifest.classes == ["<=50K", ">50K"]
    assert facts["split"]["test"] == pytest.approx(0.2 * facts["rows_kept"], rel=0.05)
    assert reader.arrays("test")["categories"].shape[1] == 8
    workclass = next(column for column in facts["columns"] if column["name"] == "workclass")
    assert workclass["missing"] == 2795


def test_heart_disease_of_four_hospitals(project, test_data):
    facts, reader = project.run(source=str(test_data / "heart-disease" / "processed.*.data"), label="num")
    assert facts["rows_in"] == 920
    assert len(facts["files"]) == 4
    assert reader.arrays("train")["numbers"].shape[1] == 13


def test_housing(project, test_data):
    source = str(test_data / "housing-california" / "housing.csv")
    facts, reader = project.run(source=source, label="median_house_value")
    assert facts["task"] == "regression"
    assert next(c["missing"] for c in facts["columns"] if c["name"] == "total_bedrooms") == 207
    assert reader.labels("test").dtype.name == "float32"
    assert "task: regression" in propose(test_data / "housing-california" / "housing.csv", "median_house_value")


def test_bike_sharing_by_time(project, test_data):
    source = str(test_data / "bike-sharing" / "hour.csv.gz")
    facts, reader = project.run(source=source, label="cnt", ignore=["casual", "registered"], split={"time": "dteday"})
    assert facts["split"]["test"] == 3476
    assert "instant is different in every row: ignored as an identifier" in facts["warnings"]
    latest = reader.table("test", ["dteday"]).column("dteday").to_pylist()
    assert min(latest).year == 2012


def test_pneumonia_mnist_keeps_its_split(project, test_data):
    source = str(test_data / "pneumonia-mnist" / "pneumoniamnist.npz")
    facts, reader = project.run(source=source, label="label")
    assert facts["split"] == {"train": 4708, "validation": 524, "test": 624}
    assert any("same features" in warning for warning in facts["warnings"])
    assert reader.arrays("test")["pixels"].max() <= 255


def test_fashion_mnist_test_files(project, test_data):
    source = str(test_data / "fashion-mnist" / "t10k-images-idx3-ubyte.gz")
    facts, reader = project.run(source=source, label="label", split={"test": 1000, "validation": 500})
    assert facts["split"] == {"train": 8500, "validation": 500, "test": 1000}
    assert facts["classes"] == {str(label): 1000 for label in range(10)}
    assert reader.arrays("test")["pixels"].shape == (1000, 784)
