"""The dossier of a model version: what two real runs recorded, nothing made up, by the points of Annex IV."""

from __future__ import annotations

import csv
import html
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.control.authorisation import acting_as
from millrace.control.dispatch import Dispatcher
from millrace.core.dossier import NOT_RECORDED, Dossier
from millrace.core.errors import ApprovalNeededError, DeniedError, NotFoundError
from millrace.core.principals import Grant, Principal
from millrace.core.types import ModelVersion, Run, Step
from millrace.wiring import open_dispatcher, open_transport

SPEC = """\
project: churn
data: {source: rows.csv, label: y}
train: {model: linear}
evaluate: {slices: [city]}
compress: {variants: none}
"""
SECRET_ROW = "Zebediah"  # of a rejected row: a person's name does not belong into what is handed on


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, chance = tmp_path_factory.mktemp("dossier"), random.Random(1)
    with (place / "rows.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["a", "b", "city", "y"])
        for _ in range(600):
            a, b, city = chance.gauss(0, 1), chance.gauss(0, 1), chance.choice("xyz")
            rows.writerow([f"{a:.4f}", f"{b:.4f}", city, "yes" if a + b + chance.gauss(0, 0.4) > 0 else "no"])
        rows.writerow(["1", "1", SECRET_ROW, ""])
    return place


@pytest.fixture(scope="module")
def home(folder: Path) -> Iterator[Dispatcher]:
    """Two versions of one model: linear, then boosting."""
    opened = open_dispatcher(str(folder / "home"))
    for text in (SPEC, SPEC.replace("linear", "boosting")):
        (folder / "millrace.yaml").write_text(text)
        run = opened.call("run.submit", {"spec_path": str(folder / "millrace.yaml")}).run
        list(opened.stream("run.drive", {"run": run.id}))
    yield opened
    opened.close()


def ask(home: Dispatcher, model: str) -> Dossier:
    return home.call("version.dossier", {"model": model}).dossier


def test_the_points_are_those_of_the_annex_in_order(home: Dispatcher) -> None:
    dossier = ask(home, "churn@2")
    assert [one.point for one in dossier.headings] == list(range(1, 10))
    words = ("General description", "Elements", "Monitoring", "Appropriateness", "Article 9", "changes",
             "Harmonised standards", "declaration of conformity", "post-market")  # fmt: skip
    assert [word for word, one in zip(words, dossier.headings, strict=True) if word not in one.title] == []
    named = {part for one in dossier.headings for part in one.parts}
    everything = {field.name for field in msgspec.structs.fields(Dossier)}
    assert named == everything - {"schema", "regulation", "written_at", "headings"}


def test_it_says_what_the_records_say(home: Dispatcher) -> None:
    dossier = ask(home, "churn@2")
    version = home.services.records.find(ModelVersion, {"name": "churn", "number": 2})[0]
    steps = {one.stage: one for one in home.services.records.find(Step, {"run_id": version.run_id})}
    assert (dossier.model.digest, dossier.model.previous, dossier.model.classes) == (
        version.bundle.digest,
        1,
        ["no", "yes"],
    )
    data, training, performance = dossier.data, dossier.training, dossier.performance
    assert data is not None
    assert training is not None
    assert performance is not None
    assert (data.name, data.number, data.digest) == ("churn", 1, steps["data"].outputs["dataset"].digest)
    assert (data.rows_in, data.rows_kept, sum(data.split.values())) == (601, 600, 600)
    assert list(data.files) == ["rows.csv"]
    assert {one.name for one in data.columns} >= {"a", "b", "city"}
    assert training.model == "boosting"
    assert training.settings["train.model"] == '"boosting"'
    assert training.environment is not None
    assert training.environment.packages["numpy"][0].isdigit()
    assert msgspec.to_builtins(performance.metrics) == steps["evaluate"].facts["metrics"]
    assert {(one.column, one.low <= one.score <= one.high) for one in performance.slices} == {("city", True)}
    assert dossier.guarantee is not None
    assert dossier.signature is not None
    assert (dossier.signature.is_trusted, dossier.signature.digest) == (True, version.bundle.digest)
    assert dossier.monitoring.reference_rows == steps["monitor"].facts["reference_rows"]
    assert dossier.promotion.gate is not None


def test_changes_are_against_the_version_before(home: Dispatcher) -> None:
    first, second = ask(home, "churn@1"), ask(home, "churn@2")
    assert (first.changes.since, first.changes.changes) == (None, [])
    changed = {(one.kind, one.name): (one.before, one.after) for one in second.changes.changes}
    assert second.changes.since == 1
    assert changed["setting", "train.model"] == ('"linear"', '"boosting"')
    assert ("metric", "accuracy") in changed
    assert {kind for kind, _ in changed} == {"setting", "metric"}  # same rows, no code, same packages


def test_approvals_and_moves_of_aliases_are_in_it(home: Dispatcher) -> None:
    home.call("approval_rule.set", {"in_project": "churn", "alias": "trial"})
    ada, bob = (Principal(id=f"user:{name}") for name in ("ada", "bob"))
    with acting_as(ada), pytest.raises(ApprovalNeededError, match="wants somebody else") as waits:
        home.call("model.promote", {"model": "churn@2", "alias": "trial", "reason": "canary"})
    with acting_as(bob):
        home.call("approval.approve", {"name": waits.value.details["approval"]})
    promotion = ask(home, "churn@2").promotion
    (approval,) = promotion.approvals
    assert (approval.state, approval.asked_by, approval.approved_by) == ("used", "user:ada", ("user:bob",))
    assert [(one.alias, one.to_version) for one in promotion.moves if one.alias == "trial"] == [("trial", 2)]
    assert ask(home, "churn@1").promotion.approvals == []
    assert "trial" in ask(home, "churn@2").model.aliases


def test_only_people_can_write_the_rest_and_it_says_so(home: Dispatcher) -> None:
    before = {one.point: one for one in ask(home, "churn@1").headings}
    assert "1(a) the intended purpose" in before[1].missing
    assert all(one.missing for one in before.values())
    home.call("version.update", {"name": "churn", "number": 1, "description": "tells who may leave",
                                 "tags": {"annex-iv.5": "See risk file R-17.", "annex-iv.99": "nowhere"}})  # fmt: skip
    after = {one.point: one for one in ask(home, "churn@1").headings}
    assert "1(a) the intended purpose" not in after[1].missing
    assert (after[5].text, after[5].missing) == ("See risk file R-17.", ())
    assert {point: one for point, one in after.items() if point not in (1, 5)} == {
        point: one for point, one in before.items() if point not in (1, 5)
    }
    assert ask(home, "churn@2").headings[4].text == ""  # a version's own text is not another one's


def test_rows_of_people_stay_out(home: Dispatcher) -> None:
    steps = home.services.records.find(Step, {"stage": "data"})
    assert any(SECRET_ROW in json.dumps(step.facts) for step in steps)  # it is among the samples of rejected rows
    answer = home.call("version.dossier", {"model": "churn@2", "html": True})
    assert SECRET_ROW not in msgspec.json.encode(answer).decode()


def test_a_version_whose_run_is_gone_says_what_its_bundle_says(home: Dispatcher) -> None:
    version = home.services.records.find(ModelVersion, {"name": "churn", "number": 2})[0]
    lost = msgspec.structs.replace(version, id="lost", name="lost", number=1, run_id="gone", version=0)
    home.services.records.put(lost)
    dossier = ask(home, "lost@1")
    assert dossier.training is None
    assert dossier.performance is not None
    assert dossier.performance.metrics == ask(home, "churn@2").performance.metrics  # type: ignore[union-attr]
    assert dossier.data is not None
    assert dossier.data.number == 1
    assert "no training is recorded of this version" in dossier.headings[1].missing


def test_an_opaque_version_has_next_to_nothing_and_nothing_is_made_up(home: Dispatcher) -> None:
    artifact = home.services.blobs.put(b"pickled")
    home.services.records.put(
        ModelVersion(id="o", name="opaque", number=1, bundle=artifact, format="opaque", source="mlflow")
    )
    dossier = ask(home, "opaque@1")
    absent = (dossier.data, dossier.training, dossier.performance, dossier.guarantee, dossier.signature)
    assert absent == (None,) * 5
    assert len([item for item in dossier.headings[1].missing if item.startswith("no ")]) == 5


def test_the_json_form_is_described_by_its_schema(home: Dispatcher) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads(msgspec.json.encode(ask(home, "churn@2")))
    jsonschema.validate(document, msgspec.json.schema(Dossier))
    assert msgspec.json.decode(json.dumps(document), type=Dossier) == msgspec.convert(document, Dossier)


def test_the_page_is_self_contained_and_shows_every_figure(home: Dispatcher) -> None:
    answer = home.call("version.dossier", {"model": "churn@2", "html": True})
    page = answer.html
    assert not re.search(r"<(script|img|link|iframe|form)\b|\bon\w+=|javascript:|url\(|@import", page)
    assert {link for link in re.findall(r'(?:href|src)="([^"]*)"', page)} <= {f"#point-{n}" for n in range(1, 10)}
    for heading in answer.dossier.headings:
        assert f"{heading.point}. {heading.title}" in html.unescape(page)
        assert [item for item in heading.missing if item not in html.unescape(page)] == []
    for one in answer.dossier.performance.slices:
        assert f"{one.score:.5g}" in page
    assert page.lower().count(NOT_RECORDED) >= 8
    assert not re.search(r">\s*None\s*<", page)


def test_whoever_may_not_see_the_project_may_not_see_the_dossier(home: Dispatcher) -> None:
    with (
        acting_as(Principal(id="user:eve", grants=(Grant(role="viewer", where="other"),))),
        pytest.raises(NotFoundError),
    ):
        ask(home, "churn@2")
    with acting_as(Principal(id="user:eve", grants=(Grant(role="worker"),))), pytest.raises(DeniedError):
        ask(home, "churn@2")
    with acting_as(Principal(id="user:vic", grants=(Grant(role="viewer", where="churn"),))):
        assert ask(home, "churn@2").model.version == 2


def test_the_command_writes_both_forms(home: Dispatcher, folder: Path) -> None:
    def invoke(*words: str) -> Any:
        return CliRunner().invoke(
            cli, ["--home", str(folder / "home"), "models", "dossier", *words], obj=Session(open_transport)
        )

    done = invoke("churn@2", "--to", str(folder / "out"))
    assert (done.exit_code, done.output.split()) == (
        0,
        [str(folder / "out/dossier.html"), str(folder / "out/dossier.json")],
    )
    saved = msgspec.json.decode((folder / "out/dossier.json").read_bytes(), type=Dossier)
    assert saved.data == ask(home, "churn@2").data
    assert (folder / "out/dossier.html").read_text().startswith("<!doctype html>")
    shown = invoke("churn@2")
    assert "5. Risk management system (Article 9)" in shown.output
    assert NOT_RECORDED in shown.output
    assert msgspec.convert(json.loads(invoke("churn@2", "--json").output), Dossier).model == ask(home, "churn@2").model
    assert invoke("churn@9").exit_code == 3


def test_old_facts_that_cannot_be_read_leave_a_gap_not_an_error(home: Dispatcher) -> None:
    version = home.services.records.find(ModelVersion, {"name": "churn", "number": 1})[0]
    home.services.records.put(Run(id="old", spec_text="nonsense: [", spec_path="x.yaml", state="succeeded"))
    home.services.records.put(Step(id="old-train", run_id="old", name="train", stage="train", facts={"framework": 3}))
    facts = {"gate": {"verdict": "of another time"}}
    old = msgspec.structs.replace(
        version, id="old", name="old", run_id="old", facts=facts, measurements=None, version=0
    )
    home.services.records.put(old)
    dossier = ask(home, "old@1")
    assert (dossier.training, dossier.promotion.gate, dossier.guarantee) == (None, None, None)
