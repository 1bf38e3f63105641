"""A context for stages, and small real datasets made by the data stage."""

from __future__ import annotations

import csv
import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from millrace.core.spec import Spec
from millrace.data.prepare import prepare

_spec = importlib.util.spec_from_file_location("train_context", Path(__file__).with_name("train_context.py"))
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
FakeContext, as_spec = _module.FakeContext, _module.as_spec


class Project:
    """A folder with a dataset in it; `context` gives the context of a step."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder, self._data = folder, data
        prepare(self.spec(), self.context("data"))  # type: ignore[arg-type]

    def spec(self, **sections: Any) -> Spec:
        return as_spec({"data": self._data, **sections})

    def context(self, step: str, **options: Any) -> Any:
        return FakeContext(self.folder / "work", self.folder, step, **options)


def copy_project(project: Project, folder: Path) -> Project:
    shutil.copytree(project.folder, folder, dirs_exist_ok=True)
    made = Project.__new__(Project)
    made.folder, made._data = folder, project._data
    return made


def write_csv(path: Path, columns: dict[str, Any]) -> None:
    """Missing values are empty cells."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


@pytest.fixture(scope="session")
def digits_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    folder = tmp_path_factory.mktemp("digits")
    values, labels = load_digits(return_X_y=True)
    pixels = {f"p{index:02d}": values[:, index].astype(int) for index in range(64)}
    write_csv(folder / "digits.csv", {**pixels, "digit": labels})
    image = {"columns": "p*", "shape": [8, 8]}
    split = {"test": 600, "validation": 150}
    return Project(folder, {"source": "digits.csv", "label": "digit", "image": image, "split": split})


@pytest.fixture
def digits(digits_once: Project, tmp_path: Path) -> Project:
    return copy_project(digits_once, tmp_path / "project")


@pytest.fixture(scope="session")
def cancer_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """Two classes of text, numbers with holes, two categories, a constant and an empty column."""
    folder = tmp_path_factory.mktemp("cancer")
    values, labels = load_breast_cancer(return_X_y=True)
    columns: dict[str, Any] = {f"n{index:02d}": values[:, index].tolist() for index in range(30)}
    columns["n01"] = ["" if row % 7 == 0 else value for row, value in enumerate(columns["n01"])]
    columns["size"] = ["large" if area > 700 else "small" if area < 400 else "" for area in columns["n03"]]
    columns["round"] = ["yes" if value < 0.17 else "no" for value in columns["n08"]]
    columns["same"], columns["empty"] = [3.5] * len(labels), [""] * len(labels)
    columns["target"] = ["benign" if label else "malignant" for label in labels]
    write_csv(folder / "cancer.csv", columns)
    types = {"same": "number", "empty": "number"}
    return Project(folder, {"source": "cancer.csv", "label": "target", "types": types})


@pytest.fixture
def cancer(cancer_once: Project, tmp_path: Path) -> Project:
    return copy_project(cancer_once, tmp_path / "project")


@pytest.fixture(scope="session")
def diabetes_once(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A number to predict, far from zero."""
    folder = tmp_path_factory.mktemp("diabetes")
    values, labels = load_diabetes(return_X_y=True)
    columns = {f"n{index}": values[:, index] for index in range(values.shape[1])}
    write_csv(folder / "diabetes.csv", {**columns, "target": labels * 1000.5 + 1e6})
    return Project(folder, {"source": "diabetes.csv", "label": "target"})


@pytest.fixture
def diabetes(diabetes_once: Project, tmp_path: Path) -> Project:
    return copy_project(diabetes_once, tmp_path / "project")
