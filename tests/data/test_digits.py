"""The digits example: openly damaged data, its counts, and the template's network."""

from __future__ import annotations

import csv
import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

import millrace
from millrace.core.spec import Split
from millrace.core.spec_errors import parse_spec
from millrace.data.digits import write_digits_csv

TEMPLATE = Path(millrace.__file__).parent / "templates" / "digits"
SECTION = {
    "source": "digits.csv",
    "label": "digit",
    "image": {"columns": "p*", "shape": [8, 8]},
    "clean": [
        "drop_duplicates",
        {"drop_missing": {"columns": "digit"}},
        {"range": {"columns": "p*", "min": 0, "max": 16}},
    ],
    "expect": {"rows": ">=1000", "classes": 10},
    "split": {"test": 600, "validation": 150, "stratify": True},
}


@pytest.fixture
def digits(project):
    write_digits_csv(project.folder / "digits.csv")
    return project


def test_facts_are_the_promised_ones(digits):
    facts, reader = digits.run(**SECTION)
    assert (facts["rows_in"], facts["rows_kept"], facts["rejected"]) == (1840, 1797, 43)
    assert facts["rejected_by_reason"] == {"duplicate": 25, "unlabelled": 9, "range": 9}
    assert facts["split"] == {"train": 1047, "validation": 150, "test": 600}
    assert facts["warnings"] == []
    assert facts["task"] == "classification"
    assert list(facts["classes"]) == [str(digit) for digit in range(10)]
    assert len(facts["samples"]) == 9
    assert all(sample["file"] == "digits.csv" for sample in facts["samples"])
    assert reader.manifest.image == [8, 8]
    assert reader.manifest.label_type == "integer"


def test_exactly_the_original_rows_survive(digits):
    _, reader = digits.run(**SECTION)
    splits = ("train", "validation", "test")
    pixels = np.concatenate([reader.arrays(split)["pixels"] for split in splits])
    labels = np.concatenate([reader.labels(split) for split in splits])
    values, targets = load_digits(return_X_y=True)
    ours = sorted(tuple(row) for row in np.column_stack([pixels, labels]).tolist())
    assert ours == sorted(tuple(row) for row in np.column_stack([values, targets]).tolist())


def test_rejected_samples_point_at_the_lines_of_the_file(digits):
    facts, _ = digits.run(**SECTION)
    with (digits.folder / "digits.csv").open() as stream:
        lines = list(csv.DictReader(stream))
    for sample in facts["samples"]:
        line = lines[sample["row"] - 1]
        if sample["reason"] == "range":
            assert line[sample["column"]] == sample["value"]
            assert int(sample["value"]) > 16
        elif sample["reason"] == "unlabelled":
            assert line["digit"] == ""
        else:
            assert lines.index(line) < sample["row"] - 1


def test_same_bytes_every_time(tmp_path):
    write_digits_csv(tmp_path / "a.csv")
    write_digits_csv(tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def template_network(seed: int) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("digits_model", TEMPLATE / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(seed)
    return module.build(SimpleNamespace(image_shape=(1, 8, 8), classes=10, features=64))


def test_template_spec_says_what_the_tests_here_run():
    spec = parse_spec((TEMPLATE / "millrace.yaml").read_text())
    assert spec.data is not None
    assert spec.data.split == Split(test=600, validation=150, stratify=True)
    assert [rule.chosen()[0] for rule in spec.data.clean] == ["drop_duplicates", "drop_missing", "range"]
    assert (spec.train.optimizer.lr, spec.train.epochs, spec.train.schedule) == (0.002, 8, "one_cycle")


def test_template_spec_gives_the_promised_facts(digits):
    facts, _ = digits.run_spec(parse_spec((TEMPLATE / "millrace.yaml").read_text()))
    assert facts["rejected_by_reason"] == {"duplicate": 25, "unlabelled": 9, "range": 9}
    assert facts["split"] == {"train": 1047, "validation": 150, "test": 600}


def test_template_network_has_its_shape_and_size():
    network = template_network(0)
    images = torch.randn(5, 1, 8, 8)
    assert network.train()(images).shape == (5, 10)
    network.eval()
    assert torch.equal(network(images), network(images))
    size_bytes = 4 * sum(values.numel() for values in network.state_dict().values())
    assert 570_000 < size_bytes < 610_000


def test_template_network_learns_digits(digits):
    """One seed here; three seeds and the mean stand in benchmarks."""
    torch.set_num_threads(1)
    _, reader = digits.run(**SECTION)
    train, test = reader.arrays("train")["pixels"], reader.arrays("test")["pixels"]
    mean, deviation = float(train.mean()), float(train.std())
    network = template_network(0)
    inputs = torch.tensor((train - mean) / deviation).reshape(-1, 1, 8, 8)
    answers = torch.tensor(reader.labels("train"))
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    steps = math.ceil(len(train) / 32)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=8 * steps)
    for _ in range(8):
        order = torch.randperm(len(train))
        for step in range(steps):
            rows = order[step * 32 : step * 32 + 32]
            loss = torch.nn.functional.cross_entropy(network(inputs[rows]), answers[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    with torch.no_grad():
        found = network(torch.tensor((test - mean) / deviation).reshape(-1, 1, 8, 8)).argmax(1).numpy()
    assert (found == reader.labels("test")).mean() >= 0.985
