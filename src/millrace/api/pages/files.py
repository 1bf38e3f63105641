"""What a run left: its report, its files. They were made by others: sent so that they can do nothing here."""

from __future__ import annotations

from pathlib import PurePosixPath
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, Response

from millrace.api.pages.rendering import HEADERS, Page
from millrace.control.dispatch import Dispatcher
from millrace.control.publishing import environment
from millrace.control.report import render_report
from millrace.control.runs import find_run
from millrace.control.services import Services
from millrace.core.errors import NotFoundError
from millrace.core.states import STEP_DONE_STATES
from millrace.core.types import TREE_MEDIA_TYPE, Artifact, ArtifactFile, Run, Step, TreeEntry

REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'; base-uri 'none'"
)
FILE_POLICY = "sandbox; default-src 'none'; frame-ancestors 'none'"
MOST_LISTED = 2000


def report(dispatcher: Dispatcher, request: Request) -> Response:
    """The run's report, made anew from its facts: the file beside the spec is of the newest run.

    Raises:
        NotFoundError: No step of the run has facts.
    """
    name = request.path_params["run"]
    html = dispatcher.perform("run.get", f"run:{name}", lambda services: _report(services, name))
    return HTMLResponse(html, headers={**HEADERS, "Content-Security-Policy": REPORT_POLICY})


def _report(services: Services, name: str) -> str:
    run = find_run(services, name)
    steps = services.records.find(Step, {"run_id": run.id})
    facts = {step.name: step.facts for step in steps if step.facts}
    if not facts:
        raise NotFoundError(f"run {run.id} has nothing to report yet", hint="a report begins with the first step's end")
    return render_report(
        facts=facts, name=run.name, state=run.state, error=run.error, spec_text=run.spec_text,
        overrides=run.overrides, environment=environment(),
        steps={step.name: (step.state, (step.ended_at or 0.0) - (step.started_at or 0.0)) for step in steps},
        digests={
            f"{step.name}.{output}": artifact.digest
            for step in steps
            if step.state in STEP_DONE_STATES
            for output, artifact in step.outputs.items()
        },
    )  # fmt: skip


def show(dispatcher: Dispatcher, request: Request) -> Page | Response:
    """A file that a run left, to download; or the listing of a folder."""
    name, path = request.path_params["run"], request.path_params["path"]

    def find(services: Services) -> Page | Response:
        run = find_run(services, name)
        place, artifact = _locate(services, run, path)
        rest = path[len(place) :].strip("/")
        if artifact.media_type != TREE_MEDIA_TYPE:
            if rest:
                raise _no_file(run, path)
            return _download(services, artifact, path)
        entries = services.blobs.tree(artifact.digest)
        for entry in entries:
            if entry.path == rest:
                return _download(services, Artifact(digest=entry.digest, size_bytes=entry.size_bytes), path)
        return _listing(run, path, rest, entries)

    return dispatcher.perform("run.get", f"run:{name}", find)


def _locate(services: Services, run: Run, path: str) -> tuple[str, Artifact]:
    """The step output or kept file that a path begins with: the longest one."""
    found: dict[str, Artifact] = {}
    for step in services.records.find(Step, {"run_id": run.id}):
        found.update({f"{step.name}/{name}": artifact for name, artifact in step.outputs.items()})
    for part in {path, *(str(parent) for parent in PurePosixPath(path).parents)}:
        kept = services.records.get(ArtifactFile, f"{run.id}/{part}")
        if kept is not None:
            found[part] = kept.artifact
    for place in sorted(found, key=len, reverse=True):
        if path == place or path.startswith(place + "/"):
            return place, found[place]
    raise _no_file(run, path)


def _no_file(run: Run, path: str) -> NotFoundError:
    return NotFoundError(f"run {run.id} has no file {path!r}", hint="its page lists what it left")


def _download(services: Services, artifact: Artifact, path: str) -> Response:
    headers = {
        **HEADERS,
        "Content-Security-Policy": FILE_POLICY,
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(PurePosixPath(path).name, safe='')}",
        "ETag": f'"{artifact.digest}"',
    }
    return FileResponse(services.blobs.path(artifact.digest), media_type="application/octet-stream", headers=headers)


def _listing(run: Run, path: str, inside: str, entries: list[TreeEntry]) -> Page:
    prefix = f"{inside}/" if inside else ""
    below = [entry for entry in entries if entry.path.startswith(prefix)]
    if not below:
        raise _no_file(run, path)
    context = {
        "run": run,
        "path": path.strip("/"),
        "files": [(entry.path.removeprefix(prefix), entry) for entry in below[:MOST_LISTED]],
        "total": len(below),
        "size_bytes": sum(entry.size_bytes for entry in below),
    }
    return Page(template="files.html", section="runs", title=path, context=context)
