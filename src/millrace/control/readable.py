"""Which blobs somebody may read who works in some projects only: what their records name, and what they sent."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from glob import has_magic
from itertools import takewhile
from pathlib import Path

from millrace.control.authorisation import acting_principal
from millrace.control.services import Services
from millrace.core.errors import DeniedError, NotFoundError
from millrace.core.principals import EVERYWHERE, OWNER, Grant
from millrace.core.spec import Data
from millrace.core.types import TREE_MEDIA_TYPE, UPLOADS, Artifact, ArtifactFile, DatasetVersion, ModelVersion, Step

FRESH_S = 1.0  # what was named within this time may look unreadable for as long
_known: dict[tuple[Path, frozenset[str]], tuple[float, frozenset[str]]] = {}
_lock = threading.Lock()


def check_readable(services: Services, digest: str) -> None:
    """Refuse a blob of other projects, as if it did not exist.

    Raises:
        NotFoundError: No record that may be seen names it.
    """
    where = services.where
    principal = acting_principal()
    if where is None or principal is None or principal.work_id is not None:
        return
    if services.records.get(ArtifactFile, f"{_sender(principal.id)}/{digest}") is not None:
        return
    key, now = (services.home, where), time.monotonic()
    with _lock:
        at, digests = _known.get(key, (-FRESH_S, frozenset()))
        if digest not in digests and now - at >= FRESH_S:
            digests = frozenset(_digests(services))
            _known[key] = (now, digests)
    if digest not in digests:
        raise NotFoundError(f"there is no blob {digest[:80]!r}", hint="it may belong to a project that is not yours")


def note_sent(services: Services, artifact: Artifact) -> None:
    """Remember that somebody has sent these bytes: who has them may use them."""
    principal = acting_principal()
    if services.where is None or principal is None or principal.work_id is not None:
        return
    owner = _sender(principal.id)
    sent = ArtifactFile(
        id=f"{owner}/{artifact.digest}", project=services.own_project, created_at=services.clock.now(), owner=owner,
        path=artifact.digest, artifact=artifact,
    )  # fmt: skip
    services.records.put(sent)


def check_path(text: str) -> None:
    """Refuse to read or write a path of the server's machine for somebody else than its owner.

    Raises:
        DeniedError: Whoever asks does not own this home.
    """
    if not _is_owner():
        raise DeniedError(
            f"{text[:200]!r} is a path of the server's machine, which only an owner may name",
            hint="set MILLRACE_URL: files that you name are then sent from your machine",
        )


def check_sources(services: Services, data: Data | None, project_dir: Path) -> None:
    """Refuse data below the home, where uploads and blobs of other projects and the keys are, to all but its owner.

    Args:
        services: The home.
        data: A spec's section, whose source is files, folders or globs.
        project_dir: The folder of the spec, whose own files are allowed.

    Raises:
        DeniedError: A source is, or holds, a place of the home.
    """
    if data is None or _is_owner():
        return
    home, own = services.home.resolve(), project_dir.resolve()
    for source in [data.source] if isinstance(data.source, str) else data.source:
        path = project_dir / source
        fixed = list(takewhile(lambda part: not has_magic(part), path.parts))
        for place in (Path(os.path.normpath(path)), Path(*fixed).resolve()):
            if not place.is_relative_to(own) and (place.is_relative_to(home) or home.is_relative_to(place)):
                raise DeniedError(
                    f"data.source {source[:200]!r} leads into the home of the server",
                    hint="name files of the spec's own folder, or a place outside of the home",
                )


def _is_owner() -> bool:
    """Whether whoever asks may name everything on this machine."""
    principal = acting_principal()
    owner = Grant(role=OWNER, where=EVERYWHERE)
    if principal is None:
        return True
    return owner in principal.grants and (principal.within is None or owner in principal.within)


def _sender(principal: str) -> str:
    return f"{UPLOADS}{principal.partition('/token:')[0]}"


def _digests(services: Services) -> Iterator[str]:
    seen: set[str] = set()
    for artifact in _artifacts(services):
        if artifact.digest in seen:
            continue
        seen.add(artifact.digest)
        yield artifact.digest
        if artifact.media_type == TREE_MEDIA_TYPE and services.blobs.exists(artifact.digest):
            yield from (entry.digest for entry in services.blobs.tree(artifact.digest))


def _artifacts(services: Services) -> Iterator[Artifact]:
    records = services.records
    for version in records.find(ModelVersion):
        found = (version.bundle, version.signature, version.measurements, version.card)
        yield from (artifact for artifact in found if artifact is not None)
    for dataset in records.find(DatasetVersion):
        yield dataset.artifact
    for file in records.find(ArtifactFile):
        if not file.owner.startswith(UPLOADS):
            yield file.artifact
    for step in records.find(Step):
        yield from step.outputs.values()
        if step.environment is not None:
            yield step.environment
