"""The dossier of a model version, to read, to print or to save: HTML made for handing on, or JSON."""

from __future__ import annotations

from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from millrace.api.pages.files import FILE_POLICY, REPORT_POLICY
from millrace.api.pages.rendering import HEADERS
from millrace.control.dispatch import Dispatcher
from millrace.control.dossier import build_dossier
from millrace.control.dossier_page import render_dossier
from millrace.control.services import Services
from millrace.core.dossier import Dossier
from millrace.core.errors import InputError, NotFoundError
from millrace.core.types import ModelVersion


def show(dispatcher: Dispatcher, request: Request) -> Response:
    """The page; `?save=html` and `?save=json` are files to download.

    Raises:
        NotFoundError: There is no such version.
        InputError: It is to be saved as something else.
    """
    name, number = request.path_params["name"], request.path_params["number"]
    save = request.query_params.get("save", "")
    if save not in ("", "html", "json"):
        raise InputError(f"a dossier is saved as html or json, got {save[:40]!r}", hint="leave `save` out to read it")

    def read(services: Services) -> Dossier:
        found = services.records.find(ModelVersion, {"name": name, "number": number})
        if not found:
            raise NotFoundError(f"model {name!r} has no version {number}", hint="the model's page lists its versions")
        return build_dossier(services, found[0])

    dossier = dispatcher.perform("version.dossier", f"model:{name}@{number}", read)
    if save == "json":
        content, media_type = msgspec.json.format(msgspec.json.encode(dossier)), "application/json"
    else:
        content, media_type = render_dossier(dossier).encode(), "text/html; charset=utf-8"
    headers = {**HEADERS, "Content-Security-Policy": FILE_POLICY if save else REPORT_POLICY}
    if save:
        file = quote(f"{name}-v{number}-dossier.{save}".replace("/", "-"), safe="")
        headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{file}"
    return Response(content, media_type=media_type, headers=headers)
