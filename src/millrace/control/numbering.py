"""Version numbers of models: they only grow, whoever registers, and are never used twice."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from millrace.core.ports import Transaction
from millrace.core.types import Model, ModelVersion


def next_number(transaction: Transaction, name: str, now_s: float, project: str = "default") -> int:
    """A number that no version of the model has or had; the model's record is made where there is none.

    Args:
        transaction: The one in which the version is put.
        name: The model.
        now_s: The present time.
        project: What the model belongs to, where it is new.
    """
    versions = transaction.find(ModelVersion, {"name": name})
    model = transaction.get(Model, name) or model_of(name, versions, now_s, project)
    number = max([model.last_number, *(version.number for version in versions)]) + 1
    changed = msgspec.structs.replace(model, last_number=number, updated_at=now_s)
    transaction.put(changed, expect_version=model.version)
    return number


def model_of(name: str, versions: Sequence[ModelVersion], now_s: float, project: str = "default") -> Model:
    """The record that a model without one should have: of its first version's project."""
    created_at = min((version.created_at for version in versions), default=now_s)
    number = max((version.number for version in versions), default=0)
    project = min(versions, key=lambda version: version.number).project if versions else project
    return Model(id=name, project=project, created_at=created_at, updated_at=now_s, name=name, last_number=number)


def project_of_model(transaction: Transaction, name: str, otherwise: str = "default") -> str:
    """The project of a model: that of all its versions and aliases."""
    model = transaction.get(Model, name)
    return otherwise if model is None else model.project
