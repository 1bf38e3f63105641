"""Verbs that put together what others ask for: the dossier of a model version, the SBOM of a run."""

from __future__ import annotations

from typing import Any

from millrace.core.dossier import Dossier
from millrace.core.operations import Operation
from millrace.core.operations.registry import ModelRequest
from millrace.core.operations.runs import RunRequest
from millrace.core.types import Struct


class DossierRequest(ModelRequest, frozen=True, kw_only=True):
    """A version; `html` asks for a page to hand on as well."""

    html: bool = False


class DossierAnswer(Struct, frozen=True, kw_only=True):
    """The dossier, and as one self-contained page when asked for."""

    dossier: Dossier
    html: str | None = None


DOSSIER = Operation(
    name="version.dossier",
    summary="Everything recorded of a model version, by the headings of the EU AI Act's technical documentation.",
    request=DossierRequest, response=DossierAnswer, method="GET", path="/models/{model}/dossier",
    subject_kind="model", subject_field="model", example={"model": "digits@champion"},
)  # fmt: skip
SBOM = Operation(
    name="run.sbom", summary="The packages that a run was made with: a CycloneDX 1.6 document.", request=RunRequest,
    response=dict[str, Any], method="GET", path="/runs/{run}/sbom", subject_kind="run", subject_field="run",
    example={"run": "last"},
)  # fmt: skip
OPERATIONS = (DOSSIER, SBOM)
