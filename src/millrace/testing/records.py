"""Conformance suite for the port `Records`: subclass it, give `open`, run it with pytest.

Example:
    >>> class TestMyRecords(RecordsConformance):
    ...     def open(self, place):
    ...         return MyRecords(place / "records")  # the same place twice: the same records
"""

from __future__ import annotations

import math
import threading
from pathlib import Path

import msgspec
import pytest

from millrace.core.errors import ConflictError, InputError
from millrace.core.ports import Records
from millrace.core.types import Alert, Alias, Artifact, DatasetVersion, Event, Lease, MetricPoint, Run, Step


def step(id: str, **fields: object) -> Step:
    """A step with defaults for what a test does not care about."""
    return msgspec.convert({"id": id, "run_id": "r1", "name": "train", "stage": "train", **fields}, Step)


def event(number: int, subject: str = "run:1") -> Event:
    """An event that can be told from others."""
    return Event(at=float(number), actor="user:1", verb="run.started", subject=subject, detail={"number": number})


def fail_after(records: Records, *runs: Run) -> None:
    """A transaction that writes and then fails with ZeroDivisionError."""
    with records.transaction() as transaction:
        for run in runs:
            transaction.put(run)
            transaction.append(event(2))
        raise ZeroDivisionError


class RecordsConformance:
    """What every implementation of `Records` must do."""

    def open(self, place: Path) -> Records:
        """Open the records that live at a place; another call opens the same ones once more."""
        raise NotImplementedError("a conformance suite is subclassed")

    @pytest.fixture
    def records(self, tmp_path: Path):
        """Empty records."""
        opened = self.open(tmp_path)
        yield opened
        opened.close()

    # ---- put, get, delete

    def test_a_record_comes_back_equal_and_with_its_version(self, records: Records) -> None:
        artifact = Artifact(digest="sha256:0", size_bytes=3)
        facts = {"text": "é\x00😀", "list": [1, 2.5, None, True]}
        stored = records.put(step("s1", created_at=5.0, outputs={"model": artifact}, facts=facts))
        assert stored.version == 1
        assert records.get(Step, "s1") == stored
        assert stored.outputs == {"model": artifact}
        assert stored.facts == facts

    def test_an_absent_record_is_none(self, records: Records) -> None:
        assert records.get(Run, "nothing") is None
        records.put(Run(id="x"))
        assert records.get(Step, "x") is None

    def test_put_replaces_and_counts(self, records: Records) -> None:
        first = records.put(Run(id="r", name="a"))
        second = records.put(Run(id="r", name="b"))
        assert (first.version, second.version) == (1, 2)
        assert records.get(Run, "r") == second

    def test_expecting_none_there_inserts_only(self, records: Records) -> None:
        records.put(Run(id="r"), expect_version=0)
        with pytest.raises(ConflictError, match="'r'"):
            records.put(Run(id="r", name="again"), expect_version=0)
        found = records.get(Run, "r")
        assert found is not None
        assert found.name == ""

    @pytest.mark.parametrize("expected", [1, 3, 99])
    def test_another_version_conflicts(self, records: Records, expected: int) -> None:
        records.put(Run(id="r"))
        records.put(Run(id="r"))
        with pytest.raises(ConflictError):
            records.put(Run(id="r", name="late"), expect_version=expected)
        assert records.put(Run(id="r"), expect_version=2).version == 3

    def test_a_version_of_what_is_not_there_conflicts(self, records: Records) -> None:
        with pytest.raises(ConflictError):
            records.put(Run(id="gone"), expect_version=1)
        assert records.get(Run, "gone") is None

    def test_delete_says_whether_it_was_there(self, records: Records) -> None:
        records.put(Run(id="r"))
        with records.transaction() as transaction:
            assert transaction.delete(Run, "r")
            assert not transaction.delete(Run, "r")
        assert records.get(Run, "r") is None

    def test_what_would_not_come_back_is_refused(self, records: Records) -> None:
        alert = Alert(id="a", endpoint="e", model="m", number=1, signal="drift", score=math.nan, threshold=0.1)
        with pytest.raises(InputError, match="alert 'a'"):
            records.put(alert)
        with pytest.raises(InputError, match="run 'r'"):
            records.put(Run(id="r", facts={"thing": object()}))
        assert records.find(Alert) == []
        assert records.find(Run) == []

    # ---- find

    def test_find_by_columns_other_fields_and_lists(self, records: Records) -> None:
        for number in range(6):
            state = ("pending", "running", "failed")[number % 3]
            cause = "a user" if number > 3 else ""
            records.put(step(f"s{number}", created_at=number + 1.0, run_id=f"r{number % 2}", state=state, reason=cause))

        def ids(where: dict[str, object] | None, **paging: object) -> list[str]:
            return [one.id for one in records.find(Step, where, **paging)]  # type: ignore[arg-type]

        assert ids(None) == ["s0", "s1", "s2", "s3", "s4", "s5"]
        assert ids({"run_id": "r1"}) == ["s1", "s3", "s5"]
        assert ids({"state": ["pending", "failed"], "run_id": "r0"}) == ["s0", "s2"]
        assert ids({"state": []}) == []
        assert ids({"reason": "a user"}) == ["s4", "s5"]
        assert ids({"reason": "a user", "run_id": "r0"}) == ["s4"]
        assert ids(None, order="-created_at", limit=2) == ["s5", "s4"]
        assert ids(None, limit=2, offset=3) == ["s3", "s4"]
        assert ids({"reason": ""}, order="-reason", limit=2, offset=1) == ["s2", "s1"]
        assert ids(None, limit=0) == []

    def test_ties_are_ordered_by_id(self, records: Records) -> None:
        for id in "bca":
            records.put(Run(id=id, created_at=7.0))
        assert [run.id for run in records.find(Run)] == ["a", "b", "c"]
        assert [run.id for run in records.find(Run, order="-created_at")] == ["c", "b", "a"]

    def test_order_of_what_may_be_absent_and_of_text(self, records: Records) -> None:
        artifact = Artifact(digest="sha256:0", size_bytes=1)
        for number, run_id in enumerate(["b", None, "B", "é", "a\U0001f600", "a\uffff", "", "_"]):
            records.put(DatasetVersion(id=str(number), name="d", number=number, artifact=artifact, run_id=run_id))
        ordered = [None, "", "B", "_", "a\uffff", "a\U0001f600", "b", "é"]  # by code point, absent first
        assert [one.run_id for one in records.find(DatasetVersion, order="run_id")] == ordered
        assert [one.run_id for one in records.find(DatasetVersion, order="-run_id")] == ordered[::-1]

    def test_find_with_numbers_of_any_size(self, records: Records) -> None:
        big = 2**53 + 1
        records.put(Alias(id="a", model="m", name="a", number=big))
        records.put(Run(id="r", created_at=float(2**53)))
        for want, found in ((big, 1), (float(2**53), 0), (2**53, 0), (2**63, 0), (-(2**70), 0), ([1, big], 1)):
            assert len(records.find(Alias, {"number": want})) == found
        for want, found in ((2**53, 1), (big, 0), (math.nan, 0), (math.inf, 0), (float(2**53), 1)):
            assert len(records.find(Run, {"created_at": want})) == found
        assert records.find(Run, {"created_at": float(2**53)}, limit=2**70, offset=2**70) == []

    def test_a_nul_character_is_refused_where_a_column_holds_it(self, records: Records) -> None:
        with pytest.raises(InputError, match="NUL"):
            records.put(Run(id="r", name="a\0b"))
        with pytest.raises(InputError, match="NUL"):
            records.append_metrics([MetricPoint("r", "a\0b", 0, 1.0, 0.0)])
        with pytest.raises(InputError, match="NUL"), records.transaction() as transaction:
            transaction.append(Event(at=1.0, actor="a\0", verb="v", subject="s"))
        assert records.find(Run, {"name": "a\0b"}) == []
        text = "a\0b"
        assert records.put(Run(id="r", tags={text: text})) == records.get(Run, "r")  # bodies may

    def test_find_none_and_numbers(self, records: Records) -> None:
        artifact = Artifact(digest="sha256:0", size_bytes=1)
        for number, run_id in ((1, None), (2, "r"), (10, None)):
            records.put(DatasetVersion(id=f"d{number}", name="d", number=number, artifact=artifact, run_id=run_id))
        assert [one.number for one in records.find(DatasetVersion, {"run_id": None}, order="number")] == [1, 10]
        assert [one.number for one in records.find(DatasetVersion, {"run_id": [None, "r"]}, order="-number")] == [
            10,
            2,
            1,
        ]
        assert [one.id for one in records.find(DatasetVersion, {"number": 2})] == ["d2"]
        assert records.find(DatasetVersion, {"number": "2"}) == []
        assert records.find(DatasetVersion, {"name": 5}) == []

    def test_an_unknown_field_is_refused(self, records: Records) -> None:
        with pytest.raises(InputError, match="no field 'colour'"):
            records.find(Run, {"colour": "red"})
        with pytest.raises(InputError, match="no field 'id; DROP TABLE runs'"):
            records.find(Run, order="id; DROP TABLE runs")

    # ---- transactions

    def test_a_transaction_is_all_or_nothing(self, records: Records) -> None:
        with records.transaction() as transaction:
            run = transaction.put(Run(id="r"), expect_version=0)
            transaction.append(event(1))
            assert transaction.get(Run, "r") == run
            assert [one.id for one in transaction.find(Run, {"state": "pending"})] == ["r"]
            assert records.get(Run, "r") is None  # not yet committed
        assert records.get(Run, "r") == run
        with pytest.raises(ZeroDivisionError):
            fail_after(records, Run(id="r", name="changed"), Run(id="other"))
        assert records.get(Run, "r") == run
        assert records.get(Run, "other") is None
        assert records.seal() == 1

    def test_a_conflict_rolls_back(self, records: Records) -> None:
        records.put(Run(id="r"))

        def change() -> None:
            with records.transaction() as transaction:
                transaction.put(Run(id="other"))
                transaction.put(Run(id="r"), expect_version=7)

        with pytest.raises(ConflictError):
            change()
        assert records.get(Run, "other") is None
        assert records.put(Run(id="other"), expect_version=0).version == 1

    def test_threads_increment_without_loss(self, records: Records) -> None:
        records.put(Lease(id="counter"))

        def add() -> None:
            for _ in range(10):
                with records.transaction() as transaction:
                    found = transaction.get(Lease, "counter")
                    assert found is not None
                    transaction.put(msgspec.structs.replace(found, token=found.token + 1), found.version)

        threads = [threading.Thread(target=add) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        counter = records.get(Lease, "counter")
        assert counter is not None
        assert counter.token == 40

    def test_another_opening_sees_what_was_committed(self, records: Records, tmp_path: Path) -> None:
        other = self.open(tmp_path)
        run = records.put(Run(id="r", name="one"))
        assert other.get(Run, "r") == run
        with pytest.raises(ConflictError):
            other.put(Run(id="r"), expect_version=0)
        other.close()

    def test_records_survive_closing(self, records: Records, tmp_path: Path) -> None:
        run = records.put(Run(id="r"))
        records.close()
        records.close()
        again = self.open(tmp_path)
        assert again.get(Run, "r") == run
        again.close()

    # ---- events

    def test_events_are_seen_once_sealed_and_in_order(self, records: Records) -> None:
        with records.transaction() as transaction:
            for number in range(3):
                transaction.append(event(number, f"run:{number % 2}"))
        assert records.events() == []
        assert records.seal() == 3
        assert records.seal() == 0
        found = records.events()
        assert [one.seq for one in found] == [1, 2, 3]
        assert [one.detail["number"] for one in found] == [0, 1, 2]
        assert len({one.chain for one in found}) == 3
        assert [one.seq for one in records.events(since=1)] == [2, 3]
        assert [one.seq for one in records.events(subject="run:0")] == [1, 3]
        assert [one.seq for one in records.events(limit=2)] == [1, 2]

    def test_an_old_sealer_is_fenced_off(self, records: Records) -> None:
        for fence in (2, 3):
            with records.transaction() as transaction:
                transaction.append(event(fence))
            assert records.seal(fence) == 1
        with records.transaction() as transaction:
            transaction.append(event(4))
        with pytest.raises(ConflictError, match="fence"):
            records.seal(2)
        assert records.seal(3) == 1

    # ---- metrics

    def test_points_come_back_in_order_of_arrival(self, records: Records) -> None:
        points = [MetricPoint("r1", ("loss", "val")[n % 2], n, n / 4, 100.0 + n) for n in range(10)]
        records.append_metrics(points[:7])
        records.append_metrics(points[7:])
        records.append_metrics([MetricPoint("r2", "loss", 0, 1.0, 0.0)])
        assert records.metrics("r1") == points
        assert records.metrics("r1", "val") == points[1::2]
        assert records.metrics("r1", since=8) == points[8:]
        assert records.metrics("r1", limit=3) == points[:3]
        assert records.metrics("r1", "loss", since=1, limit=2) == [points[2], points[4]]
        assert records.metrics("nobody") == []

    def test_points_that_are_no_numbers_survive(self, records: Records) -> None:
        values = [math.inf, -math.inf, math.nan, 5e-324]
        records.append_metrics([MetricPoint("r", "loss", n, value, 0.0) for n, value in enumerate(values)])
        assert [repr(point.value) for point in records.metrics("r")] == [repr(value) for value in values]

    def test_a_bad_point_is_refused_at_once_and_alone(self, records: Records) -> None:
        records.append_metrics([MetricPoint("r", "loss", 0, 1.0, 0.0)])
        for bad in (
            MetricPoint("r", "loss", 2**63, 1.0, 0.0),
            MetricPoint("r", "loss", 0, "one", 0.0),  # type: ignore[arg-type]
            MetricPoint("r", "\ud800", 0, 1.0, 0.0),
            MetricPoint("r", None, 0, 1.0, 0.0),  # type: ignore[arg-type]
        ):
            with pytest.raises(InputError, match="metric point"):
                records.append_metrics([bad])
        assert len(records.metrics("r")) == 1

    def test_points_are_durable_with_the_next_transaction_and_at_close(self, records: Records, tmp_path: Path) -> None:
        records.append_metrics([MetricPoint("r", "loss", 0, 1.0, 0.0)])
        with pytest.raises(ZeroDivisionError):
            fail_after(records, Run(id="x"))
        records.put(Run(id="r"))
        other = self.open(tmp_path)
        assert [point.step for point in other.metrics("r")] == [0]
        records.append_metrics([MetricPoint("r", "loss", 1, 1.0, 0.0)])
        records.close()
        assert [point.step for point in other.metrics("r")] == [0, 1]
        other.close()

    def test_deleting_a_run_deletes_its_points(self, records: Records) -> None:
        records.put(Run(id="r"))
        records.append_metrics([MetricPoint("r", "loss", 0, 1.0, 0.0), MetricPoint("s", "loss", 0, 1.0, 0.0)])
        assert len(records.metrics("r")) == 1
        with records.transaction() as transaction:
            transaction.delete(Run, "r")
        assert records.metrics("r") == []
        assert len(records.metrics("s")) == 1
