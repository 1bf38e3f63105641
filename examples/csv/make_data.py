"""Write two real tables from scikit-learn: tumours.csv (classes) and diabetes.csv (a number).

python make_data.py [FOLDER]
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from sklearn.datasets import load_breast_cancer, load_diabetes


def write_tumours(path: Path) -> int:
    """569 tumours, 30 measurements, `diagnosis` is malignant or benign; returns the rows."""
    data = load_breast_cancer()
    names = [name.replace(" ", "_") for name in data.feature_names]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["sample_id", *names, "diagnosis"])
        for number, (row, target) in enumerate(zip(data.data, data.target, strict=True), start=1):
            writer.writerow([f"S{number:04d}", *(f"{value:g}" for value in row), data.target_names[target]])
    return len(data.data)


def write_diabetes(path: Path) -> int:
    """442 patients, 10 measurements, `progression` after a year is a number; returns the rows."""
    data = load_diabetes(scaled=False)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*data.feature_names, "progression"])
        for row, target in zip(data.data, data.target, strict=True):
            writer.writerow([*(f"{value:g}" for value in row), f"{target:g}"])
    return len(data.data)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    print(f"tumours.csv: {write_tumours(folder / 'tumours.csv')} rows")
    print(f"diabetes.csv: {write_diabetes(folder / 'diabetes.csv')} rows")
