"""Experiments, runs and their values through MLflow's routes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from millrace.core.types import Event, MetricPoint, Project, Run

INVALID = (400, "INVALID_PARAMETER_VALUE")
GONE = (404, "RESOURCE_DOES_NOT_EXIST")
TAKEN = (400, "RESOURCE_ALREADY_EXISTS")
T0 = 1_700_000_000_000


def values(api: Any, run: str) -> dict[str, dict[str, Any]]:
    data = api.get("/runs/get", run_id=run)["run"]["data"]
    return {
        "metrics": {one["key"]: one["value"] for one in data["metrics"]},
        "params": {one["key"]: one["value"] for one in data["params"]},
        "tags": {one["key"]: one["value"] for one in data["tags"]},
    }


def log(api: Any, run: str, key: str, value: Any, step: int = 0, timestamp: Any = T0) -> None:
    api.post("/runs/log-metric", run_id=run, key=key, value=value, step=step, timestamp=timestamp)


# --------------------------------------------------------------------------- experiments


def test_experiment_0_is_the_project_default(api: Any) -> None:
    found = api.get("/experiments/get", experiment_id="0")["experiment"]
    assert (found["name"], found["artifact_location"]) == ("Default", "mlflow-artifacts:/0")
    assert api.get("/experiments/get-by-name", experiment_name="Default")["experiment"]["experiment_id"] == "0"
    assert api.services.records.get(Project, "0").project == "default"


def test_a_deleted_experiment_keeps_its_name_and_takes_its_runs_along(api: Any) -> None:
    experiment = api.experiment("one")
    run = api.run(experiment)
    assert api.refused("POST", "/experiments/create", name="one") == TAKEN
    api.post("/experiments/delete", experiment_id=experiment)
    assert api.refused("POST", "/experiments/create", name="one") == TAKEN
    assert api.get("/runs/get", run_id=run)["run"]["info"]["lifecycle_stage"] == "deleted"
    assert api.search(experiment) == []
    assert api.search(experiment, run_view_type="DELETED_ONLY") == [run]
    assert api.refused("POST", "/runs/create", experiment_id=experiment) == INVALID
    assert api.refused("POST", "/experiments/delete", experiment_id=experiment) == GONE
    api.post("/experiments/restore", experiment_id=experiment)
    assert api.search(experiment) == [run]


def test_experiment_names_tags_and_locations(api: Any) -> None:
    experiment = api.experiment("one")
    api.post("/experiments/update", experiment_id=experiment, new_name="two")
    api.post("/experiments/set-experiment-tag", experiment_id=experiment, key="a", value="b")
    found = api.get("/experiments/get", experiment_id=experiment)["experiment"]
    assert (found["name"], found["tags"]) == ("two", [{"key": "a", "value": "b"}])
    api.post("/experiments/delete-experiment-tag", experiment_id=experiment, key="a")
    assert api.refused("POST", "/experiments/delete-experiment-tag", experiment_id=experiment, key="a") == GONE
    placed = api.post("/experiments/create", name="three", artifact_location="s3://bucket/x")["experiment_id"]
    run = api.get("/runs/get", run_id=api.run(placed))["run"]["info"]
    assert run["artifact_uri"] == f"s3://bucket/x/{run['run_id']}/artifacts"
    assert api.get("/experiments/get", experiment_id=placed)["experiment"]["tags"] == []
    for name in ("", "x" * 501, None, 5):
        assert api.refused("POST", "/experiments/create", name=name) == INVALID
    for place in ("/tmp/x", "file:///tmp", "runs:/a/b", "s3://b/../c", "s3://b/%2e%2e/c"):
        assert api.refused("POST", "/experiments/create", name="four", artifact_location=place) == INVALID


def test_experiment_search_pages_and_filters(api: Any) -> None:
    ids = [api.experiment(name) for name in ("a", "b", "Ab")]
    page = api.post("/experiments/search", max_results=2)
    rest = api.post("/experiments/search", max_results=2, page_token=page["next_page_token"])
    shown = [one["experiment_id"] for one in [*page["experiments"], *rest["experiments"]]]
    assert shown == [*reversed(ids), "0"]
    assert "next_page_token" not in rest

    def names(text: str) -> list[str]:
        found = api.post("/experiments/search", max_results=9, filter=text, order_by=["name ASC"])
        return [one["name"] for one in found["experiments"]]

    assert names("name LIKE 'A%'") == ["Ab"]
    assert names("name ILIKE 'a%'") == ["Ab", "a"]
    assert names(f"experiment_id NOT IN ('0', '{ids[0]}')") == ["Ab", "b"]
    assert api.refused("POST", "/experiments/search", max_results=50_001) == INVALID
    assert api.refused("POST", "/experiments/search", max_results=2, page_token="x") == INVALID


# --------------------------------------------------------------------------- runs


def test_a_run_as_it_begins_and_ends(api: Any) -> None:
    experiment = api.experiment()
    run = api.run(experiment, run_name="first", tags=[{"key": "a", "value": "1"}])
    info = api.get("/runs/get", run_uuid=run)["run"]["info"]
    assert len(run) == 32
    assert info == {
        "run_id": run, "run_uuid": run, "run_name": "first", "experiment_id": experiment, "user_id": "ann",
        "status": "RUNNING", "start_time": T0, "lifecycle_stage": "active",
        "artifact_uri": f"mlflow-artifacts:/{experiment}/{run}/artifacts",
    }  # fmt: skip
    ended = api.post("/runs/update", run_id=run, status="FINISHED", end_time=str(T0 + 5))["run_info"]
    assert (ended["status"], ended["end_time"]) == ("FINISHED", T0 + 5)
    api.post("/runs/set-tag", run_id=run, key="mlflow.runName", value="renamed")
    assert api.get("/runs/get", run_id=run)["run"]["info"]["run_name"] == "renamed"
    assert values(api, run)["tags"] == {"a": "1", "mlflow.runName": "renamed"}
    record = api.services.records.get(Run, run)
    assert (record.state, record.name, record.created_by) == ("succeeded", "renamed", "ann")


def test_what_a_run_must_have(api: Any) -> None:
    experiment = api.experiment()
    assert api.refused("POST", "/runs/create", experiment_id="77") == GONE
    assert api.refused("POST", "/runs/create", experiment_id="abc") == INVALID
    both = {"run_name": "a", "tags": [{"key": "mlflow.runName", "value": "b"}]}
    assert api.refused("POST", "/runs/create", experiment_id=experiment, **both) == INVALID
    assert api.refused("GET", "/runs/get", run_id="0" * 32) == GONE
    assert api.refused("GET", "/runs/get") == INVALID
    assert api.refused("POST", "/runs/update", run_id=api.run(experiment), status="DONE") == INVALID
    assert api.get("/runs/get", run_id=api.run(experiment))["run"]["info"]["run_name"]


def test_the_latest_metric_is_the_greatest_step_time_and_value(api: Any) -> None:
    run = api.run(api.experiment())
    for value, step, timestamp in ((0.5, 1, T0 + 9), (0.9, 3, T0), (0.7, 2, T0 + 5), (0.7, 2, T0 + 5)):
        log(api, run, "acc", value, step, timestamp)
    for value in (1.0, 3.0, 2.0):
        log(api, run, "same", value)
    log(api, run, "nan", "NaN")
    log(api, run, "up", "Infinity")
    log(api, run, "text", "1.5", timestamp=str(T0))
    assert values(api, run)["metrics"] == {
        "acc": 0.9, "same": 3.0, "nan": "NaN", "up": "Infinity", "text": 1.5,
    }  # fmt: skip
    history = api.get("/metrics/get-history", run_id=run, metric_key="acc")["metrics"]
    assert [point["step"] for point in history] == [3, 2, 1]  # by time; equal points count once
    assert all(isinstance(point["timestamp"], int) for point in history)


def test_the_history_comes_in_pages(api: Any) -> None:
    run = api.run(api.experiment())
    for step in range(7):
        log(api, run, "m", float(step), step)
    seen, token = [], None
    while True:
        more = {"page_token": token} if token else {}
        page = api.get("/metrics/get-history", run_id=run, metric_key="m", max_results=3, **more)
        seen += [point["step"] for point in page["metrics"]]
        token = page.get("next_page_token")
        if not token:
            break
    assert seen == list(range(7))
    sampled = api.get("/metrics/get-history-bulk-interval", run_ids=[run], metric_key="m", max_results=3)["metrics"]
    assert [(point["run_id"], point["step"]) for point in sampled] == [(run, 0), (run, 3), (run, 6)]
    bulk = api.get("/metrics/get-history-bulk", run_id=[run], metric_key="m")["metrics"]
    assert len(bulk) == 7
    assert api.refused("GET", "/metrics/get-history", run_id=run, metric_key="m", max_results=0) == INVALID


def test_names_and_values_have_limits(api: Any) -> None:
    run = api.run(api.experiment())
    for key in ("bad$", "../up", "/abs", "", "k" * 251, "a//b", "."):
        assert api.refused("POST", "/runs/log-metric", run_id=run, key=key, value=1, timestamp=T0) == INVALID
        assert api.refused("POST", "/runs/log-parameter", run_id=run, key=key, value="1") == INVALID
        assert api.refused("POST", "/runs/set-tag", run_id=run, key=key, value="1") == INVALID
    for value, timestamp in ((None, T0), ("abc", T0), (1, -1), (1, None), (1, 2**63), (True, T0)):
        assert api.refused("POST", "/runs/log-metric", run_id=run, key="x", value=value, timestamp=timestamp) == INVALID
    api.post("/runs/log-parameter", run_id=run, key="long", value="v" * 6001)
    api.post("/runs/set-tag", run_id=run, key="long", value="v" * 8001)
    found = values(api, run)
    assert (len(found["params"]["long"]), len(found["tags"]["long"])) == (6000, 8000)


def test_a_parameter_never_changes(api: Any) -> None:
    run = api.run(api.experiment())
    for _ in range(2):
        api.post("/runs/log-parameter", run_id=run, key="p", value="1")
    assert api.refused("POST", "/runs/log-parameter", run_id=run, key="p", value="2") == INVALID
    assert values(api, run)["params"] == {"p": "1"}


def test_a_batch_is_all_or_nothing(api: Any) -> None:
    run = api.run(api.experiment())
    point = {"key": "m", "value": 1, "timestamp": T0}
    api.post("/runs/log-batch", run_id=run, metrics=[point], params=[{"key": "p", "value": "1"}], tags=[])
    new = {"tags": [{"key": "t", "value": "1"}], "metrics": [{**point, "key": "n"}]}
    assert api.refused("POST", "/runs/log-batch", run_id=run, params=[{"key": "p", "value": "2"}], **new) == INVALID
    assert api.refused("POST", "/runs/log-batch", run_id=run, params=[{"key": "$", "value": "2"}], **new) == INVALID
    found = values(api, run)
    assert (found["metrics"], found["params"]) == ({"m": 1.0}, {"p": "1"})
    assert "t" not in found["tags"]


@pytest.mark.parametrize(
    "batch",
    [
        {"metrics": [{"key": "m", "value": 1, "timestamp": T0, "step": step} for step in range(1001)]},
        {"params": [{"key": f"p{index}", "value": "1"} for index in range(101)]},
        {"tags": [{"key": f"t{index}", "value": "1"} for index in range(101)]},
        {"metrics": [{"key": "m", "value": 1, "timestamp": T0}] * 1000, "tags": [{"key": "t", "value": "1"}]},
        {"params": [{"key": "p", "value": "1"}, {"key": "p", "value": "2"}]},
        {"metrics": "many"},
        {"metrics": [{"key": "m", "timestamp": T0}]},
    ],
)
def test_a_batch_has_limits(api: Any, batch: dict[str, Any]) -> None:
    run = api.run(api.experiment())
    assert api.refused("POST", "/runs/log-batch", run_id=run, **batch) == INVALID
    assert values(api, run)["metrics"] == {}


def test_deleted_runs_can_only_be_read(api: Any) -> None:
    run = api.run(api.experiment())
    log(api, run, "m", 1.0)
    api.post("/runs/delete", run_id=run)
    assert values(api, run)["metrics"] == {"m": 1.0}
    assert api.refused("POST", "/runs/log-metric", run_id=run, key="m", value=1, timestamp=T0) == INVALID
    assert api.refused("POST", "/runs/set-tag", run_id=run, key="a", value="1") == INVALID
    assert api.refused("POST", "/runs/update", run_id=run, status="FAILED") == INVALID
    assert api.refused("POST", "/runs/log-batch", run_id=run) == INVALID
    api.post("/runs/restore", run_id=run)
    log(api, run, "m", 2.0)


def test_tags_come_and_go(api: Any) -> None:
    run = api.run(api.experiment())
    api.post("/runs/set-tag", run_id=run, key="a", value="1")
    api.post("/runs/delete-tag", run_id=run, key="a")
    assert api.refused("POST", "/runs/delete-tag", run_id=run, key="a") == GONE


def test_inputs_are_kept_once(api: Any) -> None:
    experiment = api.experiment()
    run = api.run(experiment)
    dataset = {"name": "iris", "digest": "abc", "source_type": "http", "source": "{}", "schema": "s"}
    read = {"dataset": dataset, "tags": [{"key": "mlflow.data.context", "value": "train"}]}
    for _ in range(2):
        api.post("/runs/log-inputs", run_id=run, datasets=[read])
    assert api.get("/runs/get", run_id=run)["run"]["inputs"]["dataset_inputs"] == [read]
    assert api.search(experiment, filter="dataset.name = 'iris' AND dataset.context = 'train'") == [run]
    assert api.search(experiment, filter="dataset.context = 'eval'") == []
    summary = {"experiment_id": experiment, "name": "iris", "digest": "abc", "context": "train"}
    assert api.post("/experiments/search-datasets", experiment_ids=[experiment])["dataset_summaries"] == [summary]


# --------------------------------------------------------------------------- search


@pytest.fixture
def three(api: Any) -> tuple[Any, str, list[str]]:
    """Three runs: acc 0.5, NaN, absent; p 1 and 2; the second one ended."""
    experiment = api.experiment()
    runs = [api.run(experiment, run_name=f"r{index}", start_time=T0 + index) for index in range(3)]
    log(api, runs[0], "acc", 0.5)
    log(api, runs[1], "acc", "NaN")
    for run, value in zip(runs, "12", strict=False):
        api.post("/runs/log-parameter", run_id=run, key="my p", value=value)
    api.post("/runs/update", run_id=runs[1], status="FINISHED", end_time=T0 + 50)
    return api, experiment, runs


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", [2, 1, 0]),
        ("metrics.acc >= 0.5", [0]),
        ("metrics.acc = 0", []),
        ("params.`my p` = '2'", [1]),
        ('params."my p" IS NULL', [2]),
        ("params.`my p` LIKE '%'", [1, 0]),
        ("status = 'FINISHED'", [1]),
        ("attributes.status != 'FINISHED'", [2, 0]),
        ("attributes.status LIKE 'RUN%'", [2, 0]),
        (f"start_time > {T0}", [2, 1]),
        (f"attributes.start_time = {T0 + 1}", [1]),
        (f"end_time <= {T0 + 50}", [1]),
        ("run_name ILIKE 'R2'", [2]),
        ("user_id = 'bob'", []),
    ],
)
def test_filters_find(three: tuple[Any, str, list[str]], text: str, want: list[int]) -> None:
    api, experiment, runs = three
    assert api.search(experiment, filter=text) == [runs[index] for index in want]


def test_runs_are_found_by_id(three: tuple[Any, str, list[str]]) -> None:
    api, experiment, runs = three
    assert api.search(experiment, filter=f"run_id IN ('{runs[0]}', '{runs[2]}')") == [runs[2], runs[0]]
    assert api.search(experiment, filter=f"run_id NOT IN ('{runs[0]}')") == [runs[2], runs[1]]
    place = api.get("/runs/get", run_id=runs[1])["run"]["info"]["artifact_uri"]
    assert api.search(experiment, filter=f"artifact_uri = '{place}'") == [runs[1]]


def test_orders_put_nan_and_absent_last(three: tuple[Any, str, list[str]]) -> None:
    api, experiment, runs = three
    for way in ("ASC", "DESC"):
        assert api.search(experiment, order_by=[f"metrics.acc {way}"])[0] == runs[0]
        assert set(api.search(experiment, order_by=[f"metrics.acc {way}"])[1:]) == {runs[1], runs[2]}
    assert api.search(experiment, order_by=["start_time ASC"]) == runs
    assert api.search(experiment, order_by=["params.`my p` DESC"]) == [runs[1], runs[0], runs[2]]


def test_pages_repeat_no_run_even_among_ties(api: Any) -> None:
    experiment = api.experiment()
    runs = {api.run(experiment) for _ in range(7)}
    seen, token = [], None
    while True:
        body = {"experiment_ids": [experiment], "max_results": 3, "order_by": ["metrics.none ASC"], "page_token": token}
        page = api.post("/runs/search", **body)
        seen += [run["info"]["run_id"] for run in page["runs"]]
        token = page.get("next_page_token")
        if token is None:
            break
    assert len(seen) == 7
    assert set(seen) == runs


def test_searches_that_are_refused_or_find_nothing(three: tuple[Any, str, list[str]]) -> None:
    api, experiment, _ = three
    for more in (
        {"max_results": 0}, {"max_results": 50_001}, {"page_token": "x"}, {"order_by": ["foo"]},
        {"filter": "metrics.acc > 1 OR params.p = '1'"}, {"run_view_type": "SOME"}, {"order_by": ["a", "a"]},
    ):  # fmt: skip
        assert api.refused("POST", "/runs/search", experiment_ids=[experiment], **more) == INVALID
    assert api.post("/runs/search", experiment_ids=["999"]) == api.post("/runs/search") == {"runs": []}
    assert api.refused("POST", "/runs/search", experiment_ids=["x"]) == INVALID


# --------------------------------------------------------------------------- Millrace's own runs, and the record


def test_a_native_run_is_a_run_of_an_experiment(api: Any) -> None:
    records = api.services.records
    run = records.put(
        Run(id="a" * 32, project="vision", created_at=5.0, name="fit", state="succeeded", started_at=5.0, ended_at=6.5,
            facts={"params": {"lr": 0.1}}, tags={"source": "track"})
    )  # fmt: skip
    records.append_metrics([MetricPoint(run.id, "loss", 1, math.nan, 5.5)])
    experiment = api.get("/experiments/get-by-name", experiment_name="vision")["experiment"]["experiment_id"]
    assert api.search(experiment) == [run.id]
    found = api.get("/runs/get", run_id=run.id)["run"]
    assert (found["info"]["status"], found["info"]["end_time"]) == ("FINISHED", 6500)
    assert values(api, run.id)["metrics"] == {"loss": "NaN"}
    assert values(api, run.id)["params"] == {"lr": "0.1"}
    assert "vision" in {one["name"] for one in api.post("/experiments/search", max_results=9)["experiments"]}


def test_a_run_that_a_spec_drives_keeps_its_state(api: Any) -> None:
    run = Run(id="b" * 32, project="vision", name="fit", state="running", spec_path="/p/millrace.yaml")
    api.services.records.put(run)
    assert api.refused("POST", "/runs/update", run_id=run.id, status="FINISHED") == INVALID
    api.post("/runs/set-tag", run_id=run.id, key="note", value="good")


def test_writes_are_audited_and_points_are_not(api: Any) -> None:
    run = api.run(api.experiment())
    log(api, run, "m", 1.0)
    api.services.records.seal()
    events: list[Event] = api.services.records.events()
    assert [event.verb for event in events] == ["project.create", "run.track"]
