"""Files of runs, logged models and versions: which there are, whose they are, where their bytes are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from millrace.api.mlflow import limits
from millrace.control.services import Services
from millrace.core.errors import NotFoundError
from millrace.core.types import TREE_MEDIA_TYPE, Artifact, ArtifactFile, ModelVersion, Step, Struct

SHARED_OWNER = "files"  # of paths that belong to no run, model or version
_OWNED = re.compile(r"(?:.+/)?(?P<owner>(?:m-)?[0-9a-f]{32})/artifacts(?:/(?P<path>.*))?")


class Place(Struct, frozen=True, kw_only=True):
    """A path below the artifact root: whose file it is, and its path there."""

    owner: str
    path: str = ""

    @property
    def id(self) -> str:
        """The id of the file's record."""
        return f"{self.owner}/{self.path}"


def place_of(path: str) -> Place:
    """What a path below the artifact root means: `<experiment>/<run>/artifacts/<path>` and the like.

    Args:
        path: Decoded once.

    Raises:
        InputError: It leaves its folder.

    Example:
        >>> place_of("0/" + "a" * 32 + "/artifacts/model/MLmodel").path
        'model/MLmodel'
        >>> place_of("notes/a.txt").owner
        'files'
    """
    path = limits.safe_path(path)
    match = _OWNED.fullmatch(path)
    if match is None:
        return Place(owner=SHARED_OWNER, path=path)
    return Place(owner=match["owner"], path=match["path"] or "")


def find_file(services: Services, place: Place) -> Artifact:
    """The bytes of one file.

    Raises:
        NotFoundError: There is none.
    """
    file = services.records.get(ArtifactFile, place.id)
    if file is not None:
        return file.artifact
    made = made_by_millrace(services, place.owner) if place.owner != SHARED_OWNER else {}
    if place.path not in made:
        raise NotFoundError(f"there is no file {place.path[:300]!r}")
    return made[place.path]


def all_files(services: Services, owner: str) -> dict[str, Artifact]:
    """Every file of an owner by path: those that clients sent, and those that Millrace's steps made."""
    sent = {file.path: file.artifact for file in services.records.find(ArtifactFile, {"owner": owner})}
    return {**made_by_millrace(services, owner), **sent} if owner != SHARED_OWNER else sent


def made_by_millrace(services: Services, owner: str) -> dict[str, Artifact]:
    """The outputs of a run's steps as `step/output`, or the bundle of a version."""
    found: dict[str, Artifact] = {}
    if owner.startswith("m-"):
        return found
    for step in services.records.find(Step, {"run_id": owner}):
        for name, artifact in step.outputs.items():
            _add(services, found, f"{step.name}/{name}", artifact)
    if not found:
        version = services.records.get(ModelVersion, owner)
        if version is not None:
            _add(services, found, "", version.bundle)
    return found


def _add(services: Services, found: dict[str, Artifact], path: str, artifact: Artifact) -> None:
    if artifact.media_type != TREE_MEDIA_TYPE:
        found[path] = artifact
        return
    prefix = f"{path}/" if path else ""
    for entry in services.blobs.tree(artifact.digest):
        found[prefix + entry.path] = Artifact(digest=entry.digest, size_bytes=entry.size_bytes)


def listing(files: Mapping[str, Artifact], folder: str, shown_below: str) -> list[dict[str, Any]]:
    """What is directly in a folder: files with their sizes, and folders. A file as the folder has nothing in it.

    Args:
        files: Every file by path.
        folder: Which folder; "" is the top.
        shown_below: Stands before each name in the answer.

    Example:
        >>> artifact = Artifact(digest="sha256:0", size_bytes=3)
        >>> listing({"a/b": artifact, "c": artifact}, "", "")
        [{'path': 'a', 'is_dir': True}, {'path': 'c', 'is_dir': False, 'file_size': 3}]
    """
    prefix = f"{folder}/" if folder else ""
    above = f"{shown_below}/" if shown_below else ""
    found: dict[str, dict[str, Any]] = {}
    for path, artifact in files.items():
        if not path.startswith(prefix):
            continue
        name, slash, _ = path[len(prefix) :].partition("/")
        if slash:
            found[name] = {"path": above + name, "is_dir": True}
        else:
            found[name] = {"path": above + name, "is_dir": False, "file_size": artifact.size_bytes}
    return [found[name] for name in sorted(found)]
