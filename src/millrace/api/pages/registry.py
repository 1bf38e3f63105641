"""Datasets with their profiles; models with versions, lineage, guarantees and aliases."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from millrace.api.pages.rendering import Page
from millrace.control.dispatch import Dispatcher
from millrace.control.report import decode_facts
from millrace.control.services import Services
from millrace.core.errors import CorruptError, NotFoundError
from millrace.core.facts import CompressFacts
from millrace.core.types import Alias, Artifact, DatasetVersion, Endpoint, Model, ModelVersion, Run, Step

LISTED = 500


# --------------------------------------------------------------------------- datasets


def datasets(dispatcher: Dispatcher, request: Request) -> Page:
    """Every dataset version, newest first."""
    found: list[DatasetVersion] = dispatcher.call("dataset.list", {"limit": LISTED})
    return Page(template="datasets.html", section="datasets", title="Datasets", context={"rows": found})


def dataset(dispatcher: Dispatcher, request: Request) -> Page:
    """The profile of a version: columns, classes, split, what was rejected and why."""
    given = request.path_params["dataset"]
    name, _, at = given.rpartition("@") if "@" in given else (given, "", "")

    def read(services: Services) -> dict[str, Any]:
        found = services.records.find(DatasetVersion, {"name": name}, order="-number")
        chosen = [one for one in found if at in ("", str(one.number), f"v{one.number}")]
        if not chosen:
            raise NotFoundError(f"there is no dataset {given!r}", hint="the page of datasets lists what there is")
        facts, _ = decode_facts({"data": chosen[0].facts})
        run = services.records.get(Run, chosen[0].run_id) if chosen[0].run_id else None
        return {"dataset": chosen[0], "numbers": [one.number for one in found], "data": facts.get("data"), "run": run}

    context = dispatcher.perform("dataset.get", f"dataset:{given}", read)
    shown: DatasetVersion = context["dataset"]
    context["label_bars"] = label_bars(context["data"])
    return Page(template="dataset.html", section="datasets", title=f"{shown.name}@{shown.number}", context=context)


def label_bars(data: dict[str, Any] | None) -> list[tuple[str, int]]:
    """Rows per class, or per interval of a numeric label.

    Example:
        >>> label_bars({"classes": {}, "label_histogram": {"edges": [0, 1, 2], "counts": [3, 4]}})
        [('0 to 1', 3), ('1 to 2', 4)]
    """
    if not data:
        return []
    if data["classes"]:
        return list(data["classes"].items())
    histogram = data["label_histogram"]
    edges = histogram.get("edges", [])
    return [
        (f"{low:.4g} to {high:.4g}", int(count))
        for low, high, count in zip(edges, edges[1:], histogram.get("counts", []), strict=False)
    ]


# --------------------------------------------------------------------------- models


def models(dispatcher: Dispatcher, request: Request) -> Page:
    """Every model with its newest version and its aliases."""

    def read(services: Services) -> list[dict[str, Any]]:
        versions = services.records.find(ModelVersion, order="-created_at")
        named = {one.name: one for one in services.records.find(Model)}
        aliases = services.records.find(Alias)
        rows: dict[str, dict[str, Any]] = {}
        for version in versions:
            row = rows.setdefault(version.name, {"newest": version, "count": 0})
            row["count"] += 1
        for name in named:
            rows.setdefault(name, {"newest": None, "count": 0})
        for name, row in rows.items():
            row["name"] = name
            row["description"] = named[name].description if name in named else ""
            row["aliases"] = [one for one in aliases if one.model == name]
        return list(rows.values())

    rows = dispatcher.perform("model.list", "project:default", read)
    return Page(template="models.html", section="models", title="Models", context={"rows": rows})


def model(dispatcher: Dispatcher, request: Request) -> Page:
    """The versions of a model, where its aliases stand and how they got there."""
    name = request.path_params["name"]

    def read(services: Services) -> dict[str, Any]:
        versions = services.records.find(ModelVersion, {"name": name}, order="-number")
        described = services.records.get(Model, name)
        if not versions and described is None:
            raise NotFoundError(f"there is no model {name!r}", hint="the page of models lists what there is")
        aliases = services.records.find(Alias, {"model": name})
        moves = [(alias.name, move) for alias in aliases for move in alias.history]
        return {
            "name": name,
            "model": described,
            "versions": versions,
            "aliases": aliases,
            "moves": sorted(moves, key=lambda pair: -float(pair[1].get("at") or 0.0)),
        }

    context = dispatcher.perform("model.get", f"model:{name}", read)
    return Page(template="model.html", section="models", title=name, context=context)


def version(dispatcher: Dispatcher, request: Request) -> Page:
    """One version: where it comes from, what each variant loses at most, its card."""
    name, wanted = request.path_params["name"], request.path_params["number"]

    def read(services: Services) -> dict[str, Any]:
        records = services.records
        found = records.find(ModelVersion, {"name": name, "number": wanted})
        if not found:
            raise NotFoundError(f"model {name!r} has no version {wanted}", hint="the model's page lists its versions")
        one = found[0]
        run = records.get(Run, one.run_id) if one.run_id else None
        served = records.find(Endpoint, {"model": name})
        return {
            "version": one,
            "aliases": [alias for alias in records.find(Alias, {"model": name}) if alias.number == one.number],
            "run": run,
            "dataset": _dataset_of(services, run),
            "endpoints": [each for each in served if each.number == one.number],
            "measured": _measured(services, one.measurements),
            "card": _text(services, one.card),
        }

    context = dispatcher.perform("model.get", f"model:{name}@{wanted}", read)
    return Page(template="version.html", section="models", title=f"{name} v{wanted}", context=context)


def _dataset_of(services: Services, run: Run | None) -> DatasetVersion | None:
    """The dataset that a run's data step made, or found made already."""
    if run is None:
        return None
    made = [
        step.outputs["dataset"].digest
        for step in services.records.find(Step, {"run_id": run.id, "stage": "data"})
        if "dataset" in step.outputs
    ]
    known = services.records.find(DatasetVersion, order="-created_at") if made else []
    equal = [one for one in known if one.artifact.digest in made]
    return next((one for one in equal if one.run_id == run.id), equal[0] if equal else None)


def _measured(services: Services, artifact: Artifact | None) -> dict[str, Any] | None:
    """What was measured of the variants; None when nothing was, or an older version wrote it otherwise."""
    content = _text(services, artifact)
    if content is None:
        return None
    try:
        return msgspec.to_builtins(msgspec.json.decode(content, type=CompressFacts))
    except msgspec.MsgspecError:
        return None


def _text(services: Services, artifact: Artifact | None) -> str | None:
    """A small text that is stored as a blob; None when it is gone."""
    if artifact is None:
        return None
    try:
        return services.blobs.read(artifact.digest).decode("utf-8", "replace")
    except (NotFoundError, CorruptError):
        return None
