"""Points, parameters and tags of runs; the history of a metric."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from millrace.api.mlflow import limits, requests
from millrace.api.mlflow.calls import Call, Tracking
from millrace.api.mlflow.shapes import RUN_NAME_TAG, metric_shape, number
from millrace.control import recorded
from millrace.core.errors import InputError
from millrace.core.types import MetricPoint

HISTORY_RESULTS = 25_000
HISTORY_RUNS = 100
INTERVAL_RESULTS = 2500


def log_metric(tracking: Tracking, body: requests.RunMetric) -> None:
    """One point."""
    run_id = limits.run_id_of(body)
    point = _point(run_id, body)
    news = recorded.NewValues(points=(point,), model_metrics=_of_models(run_id, [body]))
    recorded.record_values(tracking.services, run_id, news)


def log_param(tracking: Tracking, body: requests.RunPair) -> None:
    """One parameter; it never changes."""
    params = _params([requests.Pair(key=body.key, value=body.value)])
    recorded.record_values(tracking.services, limits.run_id_of(body), recorded.NewValues(params=params))


def set_tag(tracking: Tracking, body: requests.RunPair) -> None:
    """One tag; that of the name renames the run."""
    tags = _tags([requests.Pair(key=body.key, value=body.value)])
    news = recorded.NewValues(tags=tags, name=tags.get(RUN_NAME_TAG))
    recorded.record_values(tracking.services, limits.run_id_of(body), news)


def delete_tag(tracking: Tracking, body: requests.RunPair) -> None:
    """Remove a tag."""
    recorded.remove_tag(tracking.services, limits.run_id_of(body), limits.required(body.key, "key"))


def log_batch(tracking: Tracking, body: requests.Batch) -> None:
    """Many of each, all or nothing."""
    run_id = limits.run_id_of(body)
    metrics, params, tags = body.metrics or [], body.params or [], body.tags or []
    _refuse_many("metrics", metrics, limits.BATCH_METRICS)
    _refuse_many("parameters", params, limits.BATCH_PAIRS)
    _refuse_many("tags", tags, limits.BATCH_PAIRS)
    _refuse_many("metrics, parameters and tags", [*metrics, *params, *tags], limits.BATCH_ALL)
    points = [_point(run_id, metric) for metric in metrics]
    checked, own = _params(params), _tags(tags)
    if len(checked) != len(params):
        raise InputError("a batch names a parameter twice")
    news = recorded.NewValues(
        points=points, params=checked, tags=own, name=own.get(RUN_NAME_TAG), model_metrics=_of_models(run_id, metrics)
    )
    recorded.record_values(tracking.services, run_id, news)


def _refuse_many(what: str, given: Sequence[Any], most: int) -> None:
    if len(given) > most:
        raise InputError(f"a batch may have {most} {what}, got {len(given)}; send them in several")


def _point(run_id: str, metric: requests.Metric) -> MetricPoint:
    name = limits.key(metric.key, "metric")
    if metric.value is None or metric.timestamp is None:
        raise InputError(f"the metric {name!r} needs a value and a timestamp")
    if metric.timestamp < 0:
        raise InputError(f"the metric {name!r} needs a timestamp of 0 or more, got {metric.timestamp}")
    at = limits.seconds(metric.timestamp, "timestamp")
    return MetricPoint(run_id, name, limits.int64(metric.step or 0, "step"), metric.value, at)


def _of_models(run_id: str, metrics: Iterable[requests.Metric]) -> dict[str, list[dict[str, Any]]]:
    """Metrics that are also a logged model's, as its record keeps them."""
    found: dict[str, list[dict[str, Any]]] = {}
    for metric in metrics:
        if not metric.model_id:
            continue
        if bool(metric.dataset_name) != bool(metric.dataset_digest):
            raise InputError("a metric names a dataset by name and digest, or not at all")
        kept = {
            "key": metric.key,
            "value": number(metric.value or 0.0),
            "timestamp": metric.timestamp,
            "step": metric.step or 0,
            "model_id": metric.model_id,
            "run_id": run_id,
        }
        if metric.dataset_name:
            kept |= {"dataset_name": metric.dataset_name, "dataset_digest": metric.dataset_digest}
        found.setdefault(metric.model_id, []).append(kept)
    return found


def _params(given: Iterable[requests.Pair]) -> dict[str, str]:
    return {limits.key(pair.key, "parameter"): (pair.value or "")[: limits.PARAM_CHARS] for pair in given}


def _tags(given: Iterable[requests.Pair]) -> dict[str, str]:
    return {limits.key(pair.key, "tag"): (pair.value or "")[: limits.TAG_CHARS] for pair in given}


# --------------------------------------------------------------------------- history


def history(tracking: Tracking, body: requests.History) -> Any:
    """The points of a metric by time, step and arrival; all of them unless a page is asked for."""
    run_id, key = limits.run_id_of(body), limits.required(body.metric_key, "metric_key")
    size = None if body.max_results is None else limits.page_size(body.max_results, 1, limits.RESULTS)
    after = limits.decode_token(body.page_token, tuple[float, int, int])
    found = tracking.services.records.metric_history(run_id, key, None if size is None else size + 1, after)
    shown = found if size is None else found[:size]
    answer: dict[str, Any] = {"metrics": [metric_shape(point) for point, _ in shown]}
    if size is not None and len(found) > size:
        answer["next_page_token"] = limits.encode_token(shown[-1][1])
    return answer


def histories(tracking: Tracking, body: requests.Histories) -> Any:
    """The points of a metric of several runs."""
    ids = _ids(body)
    key = limits.required(body.metric_key, "metric_key")
    size = min(limits.page_size(body.max_results, HISTORY_RESULTS, 2**31), HISTORY_RESULTS)
    metrics: list[Any] = []
    for run_id in sorted(ids):
        points = tracking.services.records.metric_history(run_id, key, size - len(metrics))
        metrics += [metric_shape(point, with_run=True) for point, _ in points]
        if len(metrics) >= size:
            break
    return {"metrics": metrics}


def sampled(tracking: Tracking, body: requests.Histories) -> Any:
    """At most so many points of each run, spread evenly by step; the first and the last are among them."""
    key = limits.required(body.metric_key, "metric_key")
    size = limits.page_size(body.max_results, INTERVAL_RESULTS, INTERVAL_RESULTS)
    start, end = body.start_step, body.end_step
    if (start is None) != (end is None):
        raise InputError("start_step and end_step are given together, or not at all")
    if start is not None and end is not None and start > end:
        raise InputError(f"end_step must not be before start_step, got {start} and {end}")
    metrics: list[Any] = []
    for run_id in _ids(body):
        points = [point for point, _ in tracking.services.records.metric_history(run_id, key)]
        inside = [one for one in points if start is None or end is None or start <= one.step <= end]
        inside.sort(key=lambda point: (point.step, point.at))
        metrics += [metric_shape(point, with_run=True) for point in _spread(inside, size)]
    return {"metrics": metrics}


def _spread(points: Sequence[MetricPoint], size: int) -> list[MetricPoint]:
    if len(points) <= size:
        return list(points)
    if size == 1:
        return [points[-1]]
    last = len(points) - 1
    return [points[index * last // (size - 1)] for index in range(size)]


def _ids(body: requests.Histories) -> list[str]:
    ids = list(dict.fromkeys(body.run_ids or body.run_id or ()))
    if not 1 <= len(ids) <= HISTORY_RUNS:
        raise InputError(f"want 1 to {HISTORY_RUNS} run ids, got {len(ids)}")
    return ids


_RUN: dict[str, Any] = {"noun": "run", "field": "run_id"}
CALLS = (
    Call(method="POST", path="/runs/log-metric", operation="run.log", handler=log_metric, request=requests.RunMetric,
         **_RUN),
    Call(method="POST", path="/runs/log-parameter", operation="run.log", handler=log_param, request=requests.RunPair,
         **_RUN),
    Call(method="POST", path="/runs/log-batch", operation="run.log", handler=log_batch, request=requests.Batch, **_RUN),
    Call(method="POST", path="/runs/set-tag", operation="run.log", handler=set_tag, request=requests.RunPair, **_RUN),
    Call(method="POST", path="/runs/delete-tag", operation="run.log", handler=delete_tag, request=requests.RunPair,
         **_RUN),
    Call(method="GET", path="/metrics/get-history", operation="run.metrics", handler=history, request=requests.History,
         **_RUN),
    Call(method="GET", path="/metrics/get-history-bulk", operation="run.metrics", handler=histories,
         request=requests.Histories, noun="run"),
    Call(method="GET", path="/metrics/get-history-bulk-interval", operation="run.metrics", handler=sampled,
         request=requests.Histories, noun="run"),
)  # fmt: skip
