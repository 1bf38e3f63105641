"""Conformance suite for what runs log and how they are searched: `Transaction.log`, `RunSearch`.

Example:
    >>> class TestMyTracking(TrackingConformance):
    ...     def open(self, place):
    ...         return MyRecords(place / "records")  # the same place twice: the same records
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from millrace.core.errors import ConflictError, InputError
from millrace.core.ports import Records
from millrace.core.search import Comparison, Ordering, RunQuery, RunValues
from millrace.core.types import MetricPoint, Run, RunLink

NAN, INF = math.nan, math.inf
# step, time and value of points, each later than the one before
RISING = (
    (-5, 9.0, 9.0), (0, 1.0, 9.0), (0, 2.0, NAN), (0, 2.0, -INF), (0, 2.0, 0.0), (0, 2.0, INF), (7, 0.0, NAN),
)  # fmt: skip
# Of runs a to e with the values 1, 2, inf, -inf, NaN, and f without the metric: operator, value, who fits.
METRIC_COMPARISONS = (
    ("=", 2.0, "b"), ("!=", 2.0, "acde"), ("<", 2, "ad"), ("<=", 2, "abd"), (">", 1.5, "bc"), (">=", INF, "c"),
    ("=", -INF, "d"), ("=", NAN, ""), ("!=", NAN, "e"), (">", NAN, ""), ("IS NULL", None, "f"),
    ("IS NOT NULL", None, "abcde"),
)  # fmt: skip
TEXTS = ("Ab", "ab", "", "x*y[z]?\\", "É😀")  # of runs a to e; f has none
TEXT_COMPARISONS = (
    ("=", "Ab", "a"), ("=", "ab", "b"), ("!=", "Ab", "bcde"), ("<", "Ab", "c"), ("LIKE", "A%", "a"),
    ("LIKE", "_b", "ab"), ("ILIKE", "aB", "ab"), ("ILIKE", "%É%", "e"), ("ILIKE", "%é%", ""), ("LIKE", "%\\", "d"),
    ("LIKE", "%\\%", "d"), ("LIKE", "x*y[z]?%", "d"), ("LIKE", "x%z", ""), ("LIKE", "%", "abcde"), ("LIKE", "", "c"),
    ("LIKE", "???", ""), ("LIKE", "__", "abe"), ("IN", ("Ab", "", "zz"), "ac"), ("IN", (), ""),
    ("NOT IN", ("Ab", ""), "bde"), ("NOT IN", (), "abcde"), ("IS NULL", None, "f"), ("IS NOT NULL", None, "abcde"),
)  # fmt: skip
NONSENSE = (
    ("metric.m", "LIKE", "a"), ("metric.m", "=", "1"), ("metric.m", "=", True), ("metric.m", "=", 10**400),
    ("metric.m", "IN", ("1",)), ("param.p", "=", 1), ("param.p", "IN", "abc"), ("tag.t", "=", None),
    ("attribute.colour", "=", "red"), ("attribute.created_at", "=", "1"), ("attribute.name", "OR 1 = 1 --", "a"),
    ("dataset.size", "=", "1"), ("colour.c", "=", "red"), ("param.\0", "=", "1"), ("param.p", "=", "\ud800"),
    ("param.p", "LIKE", "%" * 5001),
)  # fmt: skip


def log(records: Records, run_id: str, **values: Any) -> None:
    """Log in a transaction of its own."""
    with records.transaction() as transaction:
        transaction.log(run_id, **values)


def log_and_fail(records: Records, run_id: str) -> None:
    """A transaction that logs and then fails with ZeroDivisionError."""
    with records.transaction() as transaction:
        point = MetricPoint(run_id, "loss", 0, 1.0, 0.0)
        transaction.log(run_id, params={"a": "1"}, tags={"a": "1"}, points=[point])
        raise ZeroDivisionError


def add(records: Records, id: str, metrics: dict[str, float] | None = None, **fields: Any) -> None:
    """A run with parameters and tags (`params`, `tags`), one point of each metric, and fields of its own."""
    params, tags = fields.pop("params", {}), fields.pop("tags", {})
    with records.transaction() as transaction:
        transaction.put(Run(**{"id": id, "created_at": 1.0, **fields}))
        points = [MetricPoint(id, name, 0, value, 0.0) for name, value in (metrics or {}).items()]
        transaction.log(id, points=points, params=params, tags=tags)


def ids(records: Records, *where: Comparison, order: tuple[Ordering, ...] = (), **query: Any) -> list[str]:
    """The ids found, sorted where no order is given."""
    found = [one.run.id for one in records.search_runs(RunQuery(where=where, order=order, **query))]
    return found if order else sorted(found)


def compare(text: str, operator: str, value: Any = None) -> Comparison:
    """`field.key`, an operator and a value as a comparison."""
    field, _, key = text.partition(".")
    return Comparison(field=field, key=key, operator=operator, value=value)  # type: ignore[arg-type]


def by(text: str) -> Ordering:
    """`field.key`, or `-field.key` for descending, as a key of an order."""
    field, _, key = text.removeprefix("-").partition(".")
    return Ordering(field=field, key=key, descending=text.startswith("-"))  # type: ignore[arg-type]


class TrackingConformance:
    """What every implementation of `TrackingWriter` and `RunSearch` must do."""

    def open(self, place: Path) -> Records:
        """Open the records that live at a place; another call opens the same ones once more."""
        raise NotImplementedError("a conformance suite is subclassed")

    @pytest.fixture
    def records(self, tmp_path: Path):
        """Empty records."""
        opened = self.open(tmp_path)
        yield opened
        opened.close()

    # ---- parameters and tags

    def test_values_come_back_and_runs_without_any_are_there(self, records: Records) -> None:
        add(records, "r", {"loss": 0.5}, params={"lr": "0.10", "é 😀": ""}, tags={"team": "vision"})
        assert records.run_values(["r", "nobody"]) == {
            "r": RunValues(
                params={"lr": "0.10", "é 😀": ""},
                tags={"team": "vision"},
                metrics={"loss": MetricPoint("r", "loss", 0, 0.5, 0.0)},
            ),
            "nobody": RunValues(),
        }
        assert records.run_values([]) == {}

    def test_a_parameter_keeps_its_value(self, records: Records) -> None:
        log(records, "r", params={"lr": "0.1"})
        log(records, "r", params={"lr": "0.1", "depth": "3"})
        with pytest.raises(ConflictError, match="'lr'") as caught:
            log(records, "r", params={"new": "1", "lr": "0.2"}, tags={"new": "1"})
        assert caught.value.details == {"key": "lr", "old": "0.1", "new": "0.2"}
        assert records.run_values(["r"])["r"] == RunValues(params={"lr": "0.1", "depth": "3"})
        log(records, "r", params={"lr": "0.2"}, replace_params=True)
        assert records.run_values(["r"])["r"].params == {"lr": "0.2", "depth": "3"}

    def test_tags_are_replaced_and_removed(self, records: Records) -> None:
        log(records, "r", tags={"a": "1", "b": "2", "c": "3"})
        log(records, "s", tags={"b": "other"})
        log(records, "r", tags={"a": "9", "c": "4"}, removed_tags=["b", "c", "absent"])
        assert records.run_values(["r"])["r"].tags == {"a": "9", "c": "4"}
        assert records.run_values(["s"])["s"].tags == {"b": "other"}

    @pytest.mark.parametrize("bad", ["a\0b", "\ud800", "x" * 251])
    def test_what_cannot_be_a_key_is_refused(self, records: Records, bad: str) -> None:
        for values in ({"params": {"good": "1", bad: "1"}}, {"tags": {bad: "1"}}):
            with pytest.raises(InputError, match="of run r cannot be stored"):
                log(records, "r", **values)
        with pytest.raises(InputError, match="metric point"):
            log(records, "r", points=[MetricPoint("r", bad, 0, 1.0, 0.0)])
        assert records.run_values(["r"])["r"] == RunValues()

    def test_long_values_and_longest_keys_are_kept(self, records: Records) -> None:
        key, value = "😀" * 250, "é😀" * 4000
        log(records, "r", params={key: value}, tags={key: value}, points=[MetricPoint("r", key, 0, 1.0, 0.0)])
        found = records.run_values(["r"])["r"]
        assert (found.params, found.tags, list(found.metrics)) == ({key: value}, {key: value}, [key])

    def test_a_log_is_all_or_nothing(self, records: Records) -> None:
        with pytest.raises(InputError, match="'s'"):
            log(records, "r", params={"a": "1"}, points=[MetricPoint("s", "loss", 0, 1.0, 0.0)])
        with pytest.raises(ZeroDivisionError):
            log_and_fail(records, "r")
        assert records.run_values(["r"])["r"] == RunValues()
        assert records.metric_history("r", "loss") == []

    # ---- metrics

    @pytest.mark.parametrize("is_buffered", [True, False])
    def test_the_latest_point_is_the_greatest_in_any_order(self, records: Records, is_buffered: bool) -> None:
        for number, order in enumerate(itertools.permutations(range(4))):
            name, points = f"m{number}", [RISING[place + number % 4] for place in order]
            for step, at, value in points:
                point = MetricPoint("r", name, step, value, at)
                if is_buffered and number % 2:
                    records.append_metrics([point])
                elif is_buffered:
                    records.append_metrics([point])
                    records.put(Run(id="x"))  # written one by one
                else:
                    log(records, "r", points=[point])
            found = records.run_values(["r"])["r"].metrics[name]
            assert repr((found.step, found.at, found.value)) == repr(RISING[3 + number % 4])

    def test_steps_of_64_bits_and_times_in_milliseconds_are_exact(self, records: Records) -> None:
        points = [
            MetricPoint("r", "m", step, 1.0, at)
            for step, at in ((-(2**63), 1700000000.001), (2**63 - 1, 1700000000.999), (2**53 + 1, 0.0))
        ]
        log(records, "r", points=points)
        assert {point for point, _ in records.metric_history("r", "m")} == set(points)
        assert records.run_values(["r"])["r"].metrics["m"] == points[1]

    def test_history_is_by_time_and_step_and_equal_points_count_once(self, records: Records) -> None:
        moments = [(2, 1.0), (1, 2.0), (1, 1.0), (1, 1.0), (3, 0.5)]
        values = [0.5, NAN, 0.25, 0.5, 0.5, NAN, INF]
        points = [MetricPoint("r", "m", step, value, at) for value in values for step, at in moments]
        log(records, "r", points=points)
        records.append_metrics([MetricPoint("r", "m", 9, 1.0, 0.0), MetricPoint("r", "n", 9, 1.0, 0.0), *points])
        found = records.metric_history("r", "m")
        in_order = sorted({(at, step) for step, at in moments})
        assert [(point.at, point.step) for point, _ in found] == [
            (0.0, 9),
            *(one for one in in_order for _ in range(4)),
        ]
        assert [repr(point.value) for point, _ in found[1:5]] == ["0.5", "nan", "0.25", "inf"]
        assert len({repr(point) for point, _ in found}) == len(found) == 17

    def test_history_goes_on_after_every_cursor(self, records: Records) -> None:
        points = [MetricPoint("r", "m", n % 3, (0.5, NAN, 1.5)[n % 7 % 3], float(n % 2)) for n in range(60)]
        log(records, "r", points=points)
        whole = records.metric_history("r", "m")
        for limit in (1, 2, 5, 100):
            pages, after = [], None
            while page := records.metric_history("r", "m", limit, after):
                assert len(page) <= limit
                pages += page
                after = page[-1][1]
            assert repr(pages) == repr(whole)
        assert records.metric_history("r", "m", 0) == []
        assert records.metric_history("r", "nothing") == []

    def test_deleting_a_run_deletes_its_values(self, records: Records) -> None:
        for id in "rs":
            add(records, id, {"loss": 1.0}, params={"a": "1"}, tags={"a": "1"})
        with records.transaction() as transaction:
            transaction.delete(Run, "r")
        assert records.run_values(["r"])["r"] == RunValues()
        assert records.metric_history("r", "loss") == []
        assert ids(records, order=(by("metric.loss"),)) == ["s"]
        left = records.run_values(["s"])["s"]
        assert (left.params, left.tags, list(left.metrics)) == ({"a": "1"}, {"a": "1"}, ["loss"])

    # ---- which runs

    def test_found_runs_are_whole(self, records: Records) -> None:
        add(records, "r", {"loss": NAN}, params={"a": "1"}, tags={"b": "2"}, spec_text="x", created_by="ann")
        (found,) = records.search_runs(RunQuery())
        assert found.run == records.get(Run, "r")
        assert repr(found.values) == repr(records.run_values(["r"])["r"])

    def test_points_that_wait_are_found(self, records: Records) -> None:
        add(records, "r")
        records.append_metrics([MetricPoint("r", "loss", 0, 0.5, 0.0)])
        assert ids(records, compare("metric.loss", "=", 0.5)) == ["r"]

    def test_lifecycle_and_projects(self, records: Records) -> None:
        add(records, "a", project="p")
        add(records, "b", project="p", deleted_at=5.0)
        add(records, "c", project="q")
        assert ids(records) == ["a", "c"]
        assert ids(records, lifecycle="deleted") == ["b"]
        assert ids(records, lifecycle="all") == ["a", "b", "c"]
        assert ids(records, projects=("p",)) == ["a"]
        assert ids(records, projects=("p", "q", "nobody")) == ["a", "c"]
        assert ids(records, projects=("nobody",)) == []

    def test_metrics_are_compared_as_numbers(self, records: Records) -> None:
        for id, number in zip("abcde", (1.0, 2.0, INF, -INF, NAN), strict=True):
            add(records, id, {"m": number, "other": 2.0})
        add(records, "f", {"M": 2.0})
        for operator, value, expected in METRIC_COMPARISONS:
            assert "".join(ids(records, compare("metric.m", operator, value))) == expected, (operator, value)

    def test_only_the_latest_point_is_compared(self, records: Records) -> None:
        add(records, "r")
        log(records, "r", points=[MetricPoint("r", "m", step, value, 0.0) for step, value in ((0, 9.0), (1, 1.0))])
        assert ids(records, compare("metric.m", ">", 5)) == []
        assert ids(records, compare("metric.m", "<", 5)) == ["r"]

    @pytest.mark.parametrize("field", ["param", "tag"])
    def test_texts_are_compared_exactly(self, records: Records, field: str) -> None:
        for id, text in zip("abcde", TEXTS, strict=True):
            values: dict[str, Any] = {f"{field}s": {"k": text, "other": "Ab"}}
            add(records, id, **values)
        add(records, "f", params={"K": "Ab"}, tags={"K": "Ab"})
        for operator, value, expected in TEXT_COMPARISONS:
            assert "".join(ids(records, compare(f"{field}.k", operator, value))) == expected, (operator, value)

    def test_attributes(self, records: Records) -> None:
        add(records, "a", name="One", state="running", created_by="ann", created_at=1.5, started_at=2.0, ended_at=3.0)
        add(records, "b", name="two", created_at=2.5)
        assert ids(records, compare("attribute.name", "LIKE", "O%")) == ["a"]
        assert ids(records, compare("attribute.name", "ILIKE", "%O%")) == ["a", "b"]
        assert ids(records, compare("attribute.id", "IN", ("b", "zz", "nul\0"))) == ["b"]
        assert ids(records, compare("attribute.id", "NOT IN", ("b",))) == ["a"]
        assert ids(records, compare("attribute.state", "!=", "running")) == ["b"]
        assert ids(records, compare("attribute.created_by", "=", "ann")) == ["a"]
        assert ids(records, compare("attribute.created_at", ">", 1.5)) == ["b"]
        assert ids(records, compare("attribute.started_at", ">=", 2)) == ["a"]
        assert ids(records, compare("attribute.ended_at", "!=", 9)) == ["a"]
        assert ids(records, compare("attribute.ended_at", "IS NULL")) == ["b"]
        assert ids(records, compare("attribute.started_at", "IS NOT NULL")) == ["a"]

    def test_ids_between_a_prefix_and_its_end(self, records: Records) -> None:
        for id in ("a", "ab", "ab1", "abé", "ab\U0010fffe", "ac", "AB", "b"):
            records.put(Run(id=id))
        tests = compare("attribute.id", ">=", "ab"), compare("attribute.id", "<", "ab\U0010ffff")
        found = ids(records, *tests, order=(by("attribute.id"),))
        assert found == ["ab", "ab1", "abé", "ab\U0010fffe"]

    def test_datasets(self, records: Records) -> None:
        for id, run, name, digest, context in (
            ("1", "a", "mnist", "d1", "training"), ("2", "a", "cifar", "d2", "eval"), ("3", "b", "mnist", "d3", ""),
        ):  # fmt: skip
            tags = {"mlflow.data.context": context} if context else {}
            records.put(
                RunLink(id=id, run_id=run, direction="input", target="dataset", name=name, digest=digest, tags=tags)
            )
        records.put(RunLink(id="4", run_id="c", direction="output", target="model", name="mnist"))
        for id in "abc":
            add(records, id)
        assert ids(records, compare("dataset.name", "=", "mnist")) == ["a", "b"]
        assert ids(records, compare("dataset.name", "LIKE", "c%")) == ["a"]
        assert ids(records, compare("dataset.name", "!=", "mnist")) == ["a"]
        assert ids(records, compare("dataset.digest", "IN", ("d2", "d3"))) == ["a", "b"]
        assert ids(records, compare("dataset.context", "=", "eval")) == ["a"]
        assert ids(records, compare("dataset.context", "ILIKE", "TRAIN%")) == ["a"]
        assert ids(records, compare("dataset.context", "IS NULL")) == ["b", "c"]
        assert ids(records, compare("dataset.name", "IS NULL")) == ["c"]
        assert ids(records, order=(by("dataset.name"),)) == ["a", "b", "c"]
        assert ids(records, order=(by("-dataset.name"),)) == ["b", "a", "c"]

    def test_all_comparisons_must_fit(self, records: Records) -> None:
        add(records, "a", {"loss": 0.1}, params={"lr": "1"}, tags={"t": "x"})
        add(records, "b", {"loss": 0.1}, params={"lr": "2"}, tags={"t": "x"})
        add(records, "c", {"loss": 0.9}, params={"lr": "1"}, tags={"t": "x"})
        three = (compare("metric.loss", "<", 0.5), compare("param.lr", "=", "1"), compare("tag.t", "LIKE", "x"))
        assert ids(records, *three) == ["a"]
        assert ids(records, compare("metric.loss", ">", 0.05), compare("metric.loss", "<", 0.5)) == ["a", "b"]

    def test_nonsense_is_refused(self, records: Records) -> None:
        for text, operator, value in NONSENSE:
            with pytest.raises(InputError):
                ids(records, compare(text, operator, value))

    # ---- in which order

    def test_without_an_order_the_newest_come_first(self, records: Records) -> None:
        for id, started in (("a", 1.0), ("b", None), ("c", 3.0), ("d", 2.0), ("e", 3.0)):
            add(records, id, started_at=started)
        assert [one.run.id for one in records.search_runs(RunQuery())] == ["e", "c", "d", "a", "b"]
        assert ids(records, order=(by("attribute.started_at"),)) == ["a", "d", "c", "e", "b"]

    def test_numbers_come_before_nan_and_absent_in_both_directions(self, records: Records) -> None:
        for id, value in (("a", NAN), ("b", 2.0), ("c", None), ("d", -INF), ("e", INF), ("f", -1.0)):
            add(records, id, {} if value is None else {"m": value})
        assert ids(records, order=(by("metric.m"),)) == ["d", "f", "b", "e", "a", "c"]
        assert ids(records, order=(by("-metric.m"),)) == ["e", "b", "f", "d", "a", "c"]
        assert ids(records, order=(by("-metric.m"), by("attribute.id"))) == ["e", "b", "f", "d", "a", "c"]
        assert ids(records, order=(by("metric.nothing"),)) == list("abcdef")

    @pytest.mark.parametrize("field", ["param", "tag"])
    def test_texts_are_ordered_by_code_point_and_absent_come_last(self, records: Records, field: str) -> None:
        for id, text in (("a", "b"), ("b", None), ("c", "B"), ("d", "10"), ("e", "9"), ("f", "é")):
            values: dict[str, Any] = {f"{field}s": {"k": text}} if text is not None else {}
            add(records, id, **values)
        assert ids(records, order=(by(f"{field}.k"),)) == ["d", "e", "c", "a", "f", "b"]
        assert ids(records, order=(by(f"-{field}.k"),)) == ["f", "a", "c", "e", "d", "b"]

    def test_a_later_key_decides_between_equals(self, records: Records) -> None:
        for id, group, loss in (("a", "x", 2.0), ("b", "y", NAN), ("c", "x", 1.0), ("d", "y", 3.0), ("e", None, 0.0)):
            add(records, id, {"loss": loss}, params={} if group is None else {"group": group})
        assert ids(records, order=(by("-param.group"), by("metric.loss"))) == ["d", "b", "c", "a", "e"]
        assert ids(records, order=(by("param.group"), by("-metric.loss"), by("-param.group"))) == list("acdbe")

    @pytest.mark.parametrize("order", ["metric.m", "-metric.m", "param.p", "-attribute.started_at", "tag.t"])
    def test_pages_never_repeat_or_miss_a_run(self, records: Records, order: str) -> None:
        for number in range(23):
            metrics = {"m": (NAN, 1.0, 2.0)[number % 3]} if number % 4 else {}
            params = {"p": str(number % 2)} if number % 5 else {}
            add(records, f"r{number:02}", metrics, params=params, started_at=float(number % 3) if number % 6 else None)
        whole = ids(records, order=(by(order),))
        assert sorted(whole) == [f"r{number:02}" for number in range(23)]
        for limit in (1, 4, 10, 50):
            pages = [ids(records, order=(by(order),), limit=limit, offset=at) for at in range(0, 30, limit)]
            assert [id for page in pages for id in page] == whole
        assert ids(records, limit=0) == []
        assert ids(records, offset=2**70) == []

    def test_too_many_keys_or_comparisons_are_refused(self, records: Records) -> None:
        with pytest.raises(InputError, match="at most"):
            ids(records, order=tuple(by(f"metric.{number}") for number in range(100)))
        with pytest.raises(InputError, match="at most"):
            ids(records, *(compare("param.p", "=", "1") for _ in range(1000)))
        assert ids(records, *(compare("param.p", "=", "1") for _ in range(100))) == []
        assert ids(records, order=tuple(by(f"tag.{number}") for number in range(20))) == []

    def test_an_unknown_key_of_an_order_is_refused(self, records: Records) -> None:
        for text in ("attribute.colour", "dataset.size", "colour.red"):
            for order in ((by(text),), (by("attribute.id"), by(text)), (by("metric.m"), by(text))):
                with pytest.raises(InputError, match=r"colour|size"):
                    ids(records, order=order)
