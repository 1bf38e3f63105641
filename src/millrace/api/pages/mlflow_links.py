"""Addresses as MLflow's client prints them (`/#/experiments/0/runs/ID`): each leads to the page that we have.

A fragment never reaches a server: `mlflow-links.js` on `/` makes a path of it, which comes here.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from millrace.api.pages.rendering import HEADERS, segment
from millrace.api.pages.runs_table import TableState
from millrace.control.dispatch import Dispatcher
from millrace.control.projects import DEFAULT_ID, DEFAULT_KEY
from millrace.control.services import Services
from millrace.core.errors import NotFoundError
from millrace.core.types import LoggedModel, Project


def experiment(dispatcher: Dispatcher, request: Request) -> Response:
    """The runs of the project with this id.

    Raises:
        NotFoundError: There is no such project.
    """
    id = request.path_params["experiment"]

    def find(services: Services) -> str:
        project = services.records.get(Project, id)
        if project is None and id != DEFAULT_ID:
            raise NotFoundError(f"there is no experiment {id!r}", hint="the page of runs lists the projects")
        return project.project if project is not None else DEFAULT_KEY

    key = dispatcher.perform("project.list", "project:default", find)
    return _to(TableState(project=key).url())


def run(dispatcher: Dispatcher, request: Request) -> Response:
    """A run, whichever of its tabs was asked for."""
    return _to(f"/runs/{segment(request.path_params['run'])}")


def logged_model(dispatcher: Dispatcher, request: Request) -> Response:
    """The run that logged a model; without one, the runs of the project."""
    id = request.path_params["model"]
    model: LoggedModel | None = dispatcher.perform(
        "run.list", "project:default", lambda services: services.records.get(LoggedModel, id)
    )
    return _to(f"/runs/{segment(model.run_id)}") if model and model.run_id else experiment(dispatcher, request)


def _to(path: str) -> Response:
    return RedirectResponse(path, status_code=303, headers=HEADERS)
