"""The dossier of a model version and the SBOM of a run: verbs; what they need is loaded when they are asked for."""

from __future__ import annotations

from typing import Any

from millrace.control.dispatch import handles
from millrace.control.models import resolve_model
from millrace.control.runs import find_run
from millrace.control.services import Services
from millrace.core import extras
from millrace.core.operations import compliance as ops


@handles(ops.DOSSIER)
def write_dossier(services: Services, body: ops.DossierRequest) -> ops.DossierAnswer:
    """From records, facts and blobs that are there; nothing is written."""
    dossier = extras.load("millrace.control.dossier:build_dossier")(services, resolve_model(services, body.model))
    html = extras.load("millrace.control.dossier_page:render_dossier")(dossier) if body.html else None
    return ops.DossierAnswer(dossier=dossier, html=html)


@handles(ops.SBOM)
def write_sbom(services: Services, body: ops.RunRequest) -> dict[str, Any]:
    """Of the environments that the run's steps recorded."""
    extras.require([("cyclonedx", "sbom")], "a software bill of materials")
    return extras.load("millrace.control.sbom:make_sbom")(services, find_run(services, body.run))
