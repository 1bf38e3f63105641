"""The nine points of Annex IV of Regulation (EU) 2024/1689: what a dossier has for each, and what it lacks.

Source: https://eur-lex.europa.eu/eli/reg/2024/1689/oj, Annex IV.
"""

from __future__ import annotations

from collections.abc import Mapping

from millrace.core.dossier import TEXT_TAG, Dossier, DossierHeading
from millrace.core.types import Struct

_PURPOSE = "1(a) the intended purpose"


class _Point(Struct, frozen=True, kw_only=True):
    """A point: the parts that belong to it, and what no record can say."""

    title: str
    parts: tuple[str, ...] = ()
    people: tuple[str, ...] = ()


_POINTS = (
    _Point(
        title="General description of the AI system",
        parts=("model",),
        people=(
            "1(a) the name of the provider",
            "1(b) hardware and software, other AI systems among them, that it works with",
            "1(c) versions of relevant software or firmware, and what updates require",
            "1(d) the forms in which it is placed on the market or put into service",
            "1(e) the hardware on which it is intended to run",
            "1(f) photographs or illustrations of products that it is a component of",
            "1(g) the user interface of the deployer",
            "1(h) instructions for use",
        ),
    ),
    _Point(
        title="Elements of the AI system and the process for its development",
        parts=("data", "training", "performance", "guarantee", "signature"),
        people=(
            "2(a) why these methods and steps, and pre-trained systems or tools of third parties",
            "2(b) design choices with their rationale and assumptions, also as to whom it is for",
            "2(c) how its software components fit together",
            "2(d) how the data were obtained, selected and labelled, and what they may be used for",
            "2(e) human oversight measures (Article 14)",
            "2(f) pre-determined changes to the system and its performance",
            "2(g) test reports, dated and signed by the persons responsible",
            "2(h) cybersecurity measures beyond the signature of the model's files",
        ),
    ),
    _Point(
        title="Monitoring, functioning and control of the AI system",
        parts=("performance", "monitoring"),
        people=(
            "accuracy for specific persons or groups on which it is intended to be used, where no slice above shows it",
            "foreseeable unintended outcomes and sources of risk to health, safety and fundamental rights",
            "human oversight measures, and what helps deployers to interpret the outputs",
        ),
    ),
    _Point(
        title="Appropriateness of the performance metrics",
        parts=("performance",),
        people=("why these metrics are appropriate for this system",),
    ),
    _Point(
        title="Risk management system (Article 9)",
        people=("a detailed description of the risk management system",),
    ),
    _Point(
        title="Relevant changes made by the provider through the lifecycle",
        parts=("changes", "promotion"),
        people=("changes of the system around this model",),
    ),
    _Point(
        title="Harmonised standards applied",
        people=("the list of harmonised standards applied, or the solutions adopted in their place",),
    ),
    _Point(
        title="EU declaration of conformity (Article 47)",
        people=("a copy of the EU declaration of conformity",),
    ),
    _Point(
        title="Performance in the post-market phase and the post-market monitoring plan (Article 72)",
        parts=("monitoring",),
        people=("the post-market monitoring plan",),
    ),
)


def headings(dossier: Dossier, tags: Mapping[str, str]) -> tuple[DossierHeading, ...]:
    """The points in their order.

    Args:
        dossier: Without headings.
        tags: Of the version and its model: `annex-iv.5` is what the provider wrote under point 5, which then
            counts as written.
    """
    return tuple(_heading(dossier, number, point, tags) for number, point in enumerate(_POINTS, start=1))


def _heading(dossier: Dossier, number: int, point: _Point, tags: Mapping[str, str]) -> DossierHeading:
    text = tags.get(f"{TEXT_TAG}{number}", "").strip()
    missing = () if text else point.people
    if number == 1 and not text and not dossier.model.description:
        missing = (_PURPOSE, *missing)
    absent = tuple(f"no {part} is recorded of this version" for part in point.parts if getattr(dossier, part) is None)
    return DossierHeading(point=number, title=point.title, parts=point.parts, text=text, missing=(*absent, *missing))
