"""A home with one of everything, some of it hostile, and a server over it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import pytest

from millrace.control.dispatch import Dispatcher
from millrace.core import facts
from millrace.core.ids import new_id
from millrace.core.types import (
    Alert,
    Alias,
    Artifact,
    ArtifactFile,
    DatasetVersion,
    Endpoint,
    MetricPoint,
    Model,
    ModelVersion,
    Record,
    Run,
    RunLink,
    Step,
)
from millrace.testing.server import RunningServer
from millrace.wiring import open_dispatcher

HOSTILE = '<script>window.hacked=1</script>"><img src=x onerror="window.hacked=1">'
SWEEP = 12
SPEC = "project: digits\ndata: {source: digits.csv, label: digit}\ntrain: {model: auto}\n"


class FilledHome:
    """A home on disk and what the tests need to know of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.text = HOSTILE
        self.dispatcher: Dispatcher = open_dispatcher(str(folder))
        self.now = time.time()
        self.pipeline = new_id()
        self.hostile = new_id()
        self.sweep = [new_id() for _ in range(SWEEP)]

    def fill(self) -> FilledHome:
        """Write everything, through the store as its writers do."""
        blobs = self.dispatcher.services.blobs
        folder = self.folder / "scratch" / "model"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(b"not really a graph")
        (folder / HOSTILE.replace("/", "")[:40]).write_bytes(b"x")
        tree = blobs.put_tree(folder)
        card = blobs.put(f"# digits\n\n| metric | value |\n|--:|:-:|\n| accuracy | 0.99 |\n\n{HOSTILE}\n".encode())
        measured = blobs.put(msgspec.json.encode(_compress()))
        records: list[Record] = [
            *self._pipeline(tree),
            *self._registry(tree, card, measured),
            *self._sweep(),
            *self._hostile(blobs.put(HOSTILE.encode())),
        ]
        with self.dispatcher.services.records.transaction() as transaction:
            for record in records:
                transaction.put(record)
            for number, run in enumerate(self.sweep):
                values = [(step, 0.5 + number / 40 + step / 1000) for step in range(30)]
                points = [MetricPoint(run, "acc", step, value, self.now + step) for step, value in values]
                points += [MetricPoint(run, "loss", step, 1 - value, self.now + step) for step, value in values]
                lr = "0.1" if number % 2 else "0.01"
                transaction.log(run, points=points, params={"lr": lr, "seed": str(number)}, tags={"owner": "ada"})
            points = [MetricPoint(self.hostile, HOSTILE, at, at if at % 5 else math.nan, self.now) for at in range(20)]
            transaction.log(self.hostile, points=points, params={HOSTILE: HOSTILE}, tags={HOSTILE: HOSTILE})
            loss = [MetricPoint(self.pipeline, "loss", at, 1 / (at + 1), self.now) for at in range(50)]
            transaction.log(self.pipeline, points=loss)
        self.dispatcher.call("model.promote", {"model": "digits@2", "reason": HOSTILE})
        self.dispatcher.services.records.seal()
        self.dispatcher.close()
        return self

    def _pipeline(self, tree: Artifact) -> list[Record]:
        log = self.folder / "logs" / "train.log"
        log.parent.mkdir(parents=True)
        log.write_text("epoch 1\n" + HOSTILE + "\n")
        found = {
            "data": _data(),
            "evaluate": facts.EvaluateFacts(
                rows=600, task="classification", confidence=0.95, classes=["0", "1"], confusion=[[1, 0], [0, 1]],
                metrics=[facts.MetricValue(name="accuracy", value=0.99, low=0.98, high=1.0)],
            ),
            "compress": _compress(),
            "monitor": _monitor(),
        }  # fmt: skip
        stages = ["data", "train", "evaluate", "compress", "monitor"]
        steps = [
            Step(
                id=new_id(), run_id=self.pipeline, name=stage, stage=stage, state="cached" if stage == "data" else "succeeded",
                started_at=self.now - 60 + 10 * at, ended_at=self.now - 50 + 10 * at, reason="first time",
                facts=msgspec.to_builtins(found[stage]) if stage in found else {},
                outputs={"dataset" if stage == "data" else "model": tree} if stage in ("data", "train") else {},
                log_path=str(log) if stage == "train" else "",
            )
            for at, stage in enumerate(stages)
        ]  # fmt: skip
        run = Run(
            id=self.pipeline, project="digits", name="digits", state="succeeded", spec_path="/project/millrace.yaml",
            spec_text=SPEC, started_at=self.now - 60, ended_at=self.now - 5, created_at=self.now - 60,
        )  # fmt: skip
        return [run, *steps]

    def _registry(self, tree: Artifact, card: Artifact, measured: Artifact) -> list[Record]:
        version = ModelVersion(
            id=new_id(), name="digits", number=1, bundle=tree, card=card, measurements=measured, run_id=self.pipeline,
            chosen_variant="int8", facts={"gate": {"verdict": "first", "explanation": "first version"}},
        )  # fmt: skip
        foreign = ModelVersion(
            id=new_id(), name=f"team/{HOSTILE}", number=1, bundle=tree, source="mlflow", format="opaque",
            description=HOSTILE, tags={HOSTILE: HOSTILE},
        )  # fmt: skip
        second = msgspec.structs.replace(version, id=new_id(), number=2, run_id=None, source="file", measurements=None)
        moves = [{"from": None, "to": 1, "at": self.now, "reason": "first version"}]
        dataset = DatasetVersion(
            id=new_id(),
            name="digits",
            number=1,
            artifact=tree,
            run_id=self.pipeline,
            facts=msgspec.to_builtins(_data()),
        )
        served = {
            "requests": 600,
            "answered": 600,
            "wrong": 0,
            "p50_s": 0.00017,
            "p99_s": 0.0005,
            "requests_per_s": 4e3,
        }
        return [
            version, second, foreign, Model(id=foreign.name, name=foreign.name, description=HOSTILE), dataset,
            msgspec.structs.replace(dataset, id=new_id(), name="prices", run_id=None, facts=msgspec.to_builtins(_prices())),
            Alias(id="digits/champion", model="digits", name="champion", number=1, history=moves),
            Endpoint(id="digits", name="digits", model="digits", number=1, variant="int8", facts=served),
            Alert(
                id=new_id(), endpoint="digits", model="digits", number=1, signal="drift", score=1.0, threshold=0.1,
                title=HOSTILE, created_at=self.now,
            ),
        ]  # fmt: skip

    def _sweep(self) -> list[Record]:
        return [
            Run(
                id=run, name=f"sweep-{number:02d}", project="vision", state="failed" if number == 3 else "succeeded",
                started_at=self.now - 1000 + number, ended_at=self.now - 900 + 2 * number, created_at=self.now,
            )
            for number, run in enumerate(self.sweep)
        ]  # fmt: skip

    def _hostile(self, file: Artifact) -> list[Record]:
        error = {"code": "stage.failed", "message": HOSTILE, "hint": HOSTILE, "details": {}}
        run = Run(
            id=self.hostile, name=HOSTILE, project="hostile", state="failed", started_at=self.now, ended_at=self.now,
            created_by=HOSTILE, error=error, created_at=self.now,
        )  # fmt: skip
        kept = ArtifactFile(id=f"{run.id}/notes/page.html", owner=run.id, path="notes/page.html", artifact=file)
        link = RunLink(id=new_id(), run_id=run.id, direction="input", target="dataset", name=HOSTILE, digest=HOSTILE)
        return [run, kept, link]


def _data() -> facts.DataFacts:
    column = facts.ColumnFacts(name=HOSTILE, type="number", role="feature", missing=3, distinct=9, mean=0.5, sd=0.1)
    sample = facts.RejectedSample(rule="range", reason="range", column="p1", value=HOSTILE, file="digits.csv", row=7)
    return facts.DataFacts(
        rows_in=1840, rows_kept=1797, rejected=43, rejected_by_reason={"duplicate": 25, "range": 18},
        split={"train": 1047, "validation": 150, "test": 600}, task="classification", label="digit",
        classes={"0": 900, HOSTILE: 897}, columns=[column], samples=[sample], files=["digits.csv"], warnings=["few rows"],
    )  # fmt: skip


def _prices() -> facts.DataFacts:
    return facts.DataFacts(
        rows_in=10, rows_kept=10, rejected=0, rejected_by_reason={}, split={"train": 7, "validation": 1, "test": 2},
        task="regression", label="price", label_histogram={"edges": [0.0, 10.0, 20.0], "counts": [7, 3]},
    )  # fmt: skip


def _compress() -> facts.CompressFacts:
    guarantee = facts.GuaranteeFacts(
        status="certified", metric="accuracy", base_score=0.99, score=0.99, drop=0.0, bound=0.0045, limit=0.01,
        confidence=0.95, rows=600, changed=0, changed_bound=0.005, changed_limit=0.05,
    )  # fmt: skip
    latency = [facts.LatencyFacts(batch_size=1, p50_s=4e-5, speedup=1.6, low=1.5, high=1.7)]
    base = facts.VariantFacts(
        name="fp32", size_bytes=590_479, size_ratio=1.0, snr_db=None, guarantee=None, latency=latency
    )
    small = msgspec.structs.replace(base, name="int8", size_bytes=159_709, size_ratio=3.7, guarantee=guarantee)
    return facts.CompressFacts(
        variants=[base, small], chosen="int8", why="int8 is the fastest certified variant", rows=600, max_drop=0.01,
        max_changed=0.05, confidence=0.95, threads=1,
    )  # fmt: skip


def _monitor() -> facts.MonitorFacts:
    top = [facts.FeatureSignal(name=HOSTILE, score=0.1, threshold=0.2)]
    clean = facts.DriftWindow(label="clean", rows=150, score=0.1, threshold=0.2, is_alert=False, top=top)
    loud = msgspec.structs.replace(clean, label="inverted", score=1.0, is_alert=True)
    return facts.MonitorFacts(
        windows=[clean, loud], false_alarms=0.02, measured_false_alarms=0.015, reference_rows=600, window_rows=200
    )


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> FilledHome:
    return FilledHome(tmp_path_factory.mktemp("pages") / "home").fill()


@pytest.fixture(scope="session")
def running(filled: FilledHome) -> Iterator[RunningServer]:
    with RunningServer(filled.folder) as server:
        yield server


@pytest.fixture(scope="session")
def web(running: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
def page_paths(filled: FilledHome) -> dict[str, str]:
    """Every kind of page, filled."""
    return {
        "runs": "/",
        "runs sorted": "/runs?sort=-metrics.acc&column=metrics.acc&column=params.lr&column=tags.owner",
        "run": f"/runs/{filled.pipeline}",
        "hostile run": f"/runs/{filled.hostile}",
        "files": f"/runs/{filled.pipeline}/files/train/model",
        "compare": f"/compare?runs={','.join(filled.sweep[:3])}&runs={filled.pipeline},{filled.hostile}",
        "datasets": "/datasets",
        "dataset": "/datasets/digits@1",
        "numeric dataset": "/datasets/prices@1",
        "models": "/models",
        "model": "/models/digits",
        "version": "/models/digits/versions/1",
        "endpoints": "/endpoints",
        "endpoint": "/endpoints/digits",
        "events": "/events",
    }
