"""Where a model version comes from: which sources are taken, and which files they mean."""

from __future__ import annotations

import re
import urllib.parse
from typing import Any

from millrace.api.mlflow import files, limits
from millrace.api.mlflow.calls import Tracking
from millrace.api.mlflow.logged_models import stored_model
from millrace.api.mlflow.runs import stored_run
from millrace.api.mlflow.shapes import model_root, version_source
from millrace.control import registered
from millrace.core.errors import InputError, NotFoundError
from millrace.core.types import Alias, Artifact, LoggedModel, ModelVersion, Run, Struct, TreeEntry

LOCAL = frozenset({"", "file", "ftp", "sftp"})  # disks, and hosts that anybody may name
SOURCE_CHARS = 500
_PROXY = "/api/2.0/mlflow-artifacts/artifacts/"
_LOGGED = re.compile(r"m-[0-9a-f]{32}")


class Source(Struct, frozen=True, kw_only=True):
    """A source that is allowed: the URI as kept, and its files as a tree."""

    uri: str
    bundle: Artifact
    run_id: str | None = None
    model_id: str | None = None
    download_uri: str = ""


def resolve(tracking: Tracking, uri: str, run_id: str, model_id: str) -> Source:
    """What a source means.

    Files of this server are taken only from the run or logged model that the request names; nothing is ever read
    from a disk by its path.

    Args:
        tracking: The home.
        uri: As given.
        run_id: The run that the request names, or "".
        model_id: The logged model that the request names, or "".

    Raises:
        InputError: The source is not allowed.
    """
    limits.within(uri, SOURCE_CHARS, "a source")
    plain = limits.fully_unquoted(uri.replace("+", " "))
    parsed = urllib.parse.urlsplit(uri)
    if ".." in re.split(r"[/\\]", plain) or "\0" in plain or "\\" in plain:
        raise _refused(uri, "it leaves its place")
    if parsed.scheme in LOCAL:
        raise _refused(uri, "paths on a disk are not taken")
    if parsed.scheme in ("http", "https"):
        if _PROXY in parsed.path:
            return _from_artifacts(tracking, uri, parsed, run_id, model_id)
        return _elsewhere(tracking, uri, run_id, model_id)
    reader = _READERS.get(parsed.scheme)
    return reader(tracking, uri, parsed, run_id, model_id) if reader else _elsewhere(tracking, uri, run_id, model_id)


def _refused(uri: str, why: str) -> InputError:
    return InputError(f"the model version source {uri[:300]!r} is not allowed: {why}")


def _elsewhere(tracking: Tracking, uri: str, run_id: str, model_id: str) -> Source:
    """Files that another store keeps: the version points there and has none of its own."""
    named = run_id or _run_of(_named_model(tracking, model_id))
    bundle = registered.put_listing(tracking.services, [])
    return Source(uri=uri, bundle=bundle, run_id=named, model_id=model_id or None, download_uri=uri)


def _from_models(tracking: Tracking, uri: str, parsed: Any, run_id: str, model_id: str) -> Source:
    """`models:/m-…` is a logged model; `models:/name/3` and `models:/name@alias` are versions."""
    if parsed.netloc:
        raise _refused(uri, "only this registry's models are taken")
    text = urllib.parse.unquote(parsed.path).strip("/")
    if _LOGGED.fullmatch(text):
        if model_id != text:
            raise _refused(uri, "model_id must name the logged model")
        model = stored_model(tracking, text)
        return _of_model(tracking, uri, model, "", run_id)
    version = _version(tracking, uri, text)
    if (run_id and run_id != version.run_id) or (model_id and model_id != version.facts.get("model_id")):
        raise _refused(uri, "run_id and model_id must be those of the version")
    canonical = f"models:/{version.name}/{version.number}"
    return Source(
        uri=canonical, bundle=version.bundle, run_id=version.run_id, model_id=version.facts.get("model_id"),
        download_uri=download_uri(version),
    )  # fmt: skip


def _version(tracking: Tracking, uri: str, text: str) -> ModelVersion:
    name, at, alias = text.partition("@")
    number: int | None = None
    records = tracking.services.records
    if at:
        found = records.get(Alias, f"{name}/{alias}")
        number = found.number if found else None
    else:
        name, _, tail = text.partition("/")
        versions = records.find(ModelVersion, {"name": name})
        if tail.isascii() and tail.isdigit() and len(tail) < 19:
            number = int(tail)
        elif tail:
            at_stage = [one.number for one in versions if tail.lower() in ("latest", one.stage.lower())]
            number = max(at_stage, default=None)
    found_versions = records.find(ModelVersion, {"name": name, "number": number}) if number is not None else []
    if not found_versions:
        raise NotFoundError(f"there is no model version {uri[:300]!r}")
    return found_versions[0]


def _from_run(tracking: Tracking, uri: str, parsed: Any, run_id: str, model_id: str) -> Source:
    """`runs:/<run>/<path>`: files of the run that the request names too."""
    named, _, path = urllib.parse.unquote(parsed.path).strip("/").partition("/")
    if model_id or parsed.netloc or not run_id or named != run_id or not path:
        raise _refused(uri, "run_id must name the run that has the files")
    run = _existing_run(tracking, uri, run_id)
    return _of_run(tracking, uri, run, path)


def _from_artifacts(tracking: Tracking, uri: str, parsed: Any, run_id: str, model_id: str) -> Source:
    """A place below the artifact root of the run or logged model that the request names."""
    path = parsed.path.partition(_PROXY)[2] if _PROXY in parsed.path else parsed.path.lstrip("/")
    try:
        place = files.place_of(urllib.parse.unquote(path).rstrip("/"))
    except InputError:
        raise _refused(uri, "it leaves its place") from None
    if model_id and place.owner == model_id:
        return _of_model(tracking, uri, stored_model(tracking, model_id), place.path, run_id)
    if run_id and not model_id and place.owner == run_id:
        return _of_run(tracking, uri, _existing_run(tracking, uri, run_id), place.path)
    raise _refused(uri, "run_id or model_id must name whose files they are")


def _of_run(tracking: Tracking, uri: str, run: Run, path: str) -> Source:
    return Source(uri=uri, bundle=_tree(tracking, run.id, path), run_id=run.id, download_uri=uri)


def _of_model(tracking: Tracking, uri: str, model: LoggedModel, path: str, run_id: str) -> Source:
    place = model_root(tracking.projects.of_key(model.project), model.id)
    return Source(
        uri=uri, bundle=_tree(tracking, model.id, path), run_id=run_id or model.run_id,
        model_id=model.id, download_uri=f"{place}/{path}".rstrip("/"),
    )  # fmt: skip


def _tree(tracking: Tracking, owner: str, folder: str) -> Artifact:
    """The files below a folder as a tree: opaque bytes, kept whatever happens to the run."""
    prefix = f"{folder}/" if folder else ""
    entries = [
        TreeEntry(path=path[len(prefix) :], digest=artifact.digest, size_bytes=artifact.size_bytes)
        for path, artifact in files.all_files(tracking.services, owner).items()
        if path.startswith(prefix)
    ]
    return registered.put_listing(tracking.services, entries)


def _existing_run(tracking: Tracking, uri: str, run_id: str) -> Run:
    try:
        return stored_run(tracking, run_id)
    except NotFoundError:
        raise _refused(uri, "there is no such run") from None


def _named_model(tracking: Tracking, model_id: str) -> LoggedModel | None:
    return stored_model(tracking, model_id) if model_id else None


def _run_of(model: LoggedModel | None) -> str | None:
    return model.run_id if model else None


def download_uri(version: ModelVersion) -> str:
    """Where clients get a version's files."""
    return version.facts.get("download_uri") or version_source(version)


_READERS: dict[str, Any] = {"models": _from_models, "runs": _from_run, "mlflow-artifacts": _from_artifacts}
