"""The audit: every kind of tampering is found and located; proofs, retention, searches."""

from __future__ import annotations

import hashlib
import hmac
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from millrace.control.audit_checking import as_stretches
from millrace.control.authorisation import acting_as
from millrace.control.dispatch import Dispatcher
from millrace.control.heads import as_line, ledger, sign_now
from millrace.core.clock import FakeClock
from millrace.core.csv_cells import safe_cell
from millrace.core.errors import (
    CorruptError,
    DeniedError,
    InputError,
    NotFoundError,
    UntrustedError,
)
from millrace.core.operations.audit import AuditReport
from millrace.core.principals import Grant, Principal
from millrace.core.types import AuditHead, Event
from millrace.store.database import Connection
from millrace.store.records_sql import SqlRecords
from millrace.testing.postgres import new_records_url
from millrace.wiring import open_dispatcher

pytestmark = pytest.mark.xdist_group("postgres")
SIZE = 24  # events of the home that is tampered with; signed heads over 8, 16 and 24
TABLES = ("events", "event_details", "meta", "audit_heads")


def append(records: SqlRecords, count: int, first: int = 0, **fields: Any) -> None:
    with records.transaction() as transaction:
        for number in range(first, first + count):
            values = {"at": 100.0 + number, "actor": f"user:u{number % 3}", "verb": "run.end",
                      "subject": f"run:{number}", "detail": {"n": number}}  # fmt: skip
            transaction.append(Event(**(values | fields)))
    records.seal()


class Ground:
    """A home with a good chain, tampered with and put back as often as wanted."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.records = ledger(dispatcher.services)
        for first in range(0, SIZE, 8):
            append(self.records, 8, first)
            sign_now(dispatcher.services)
        self.published = "\n".join(as_line(head).decode() for head in self.records.find(AuditHead, order="size"))
        with self.records.writing() as connection:
            self._kept = {name: connection.execute(f"SELECT * FROM {name}").fetchall() for name in TABLES}

    def put_back(self) -> None:
        with self.records.writing() as connection:
            for name, rows in self._kept.items():
                connection.execute(f"DELETE FROM {name}")
                marks = ", ".join("?" * len(rows[0]))
                for row in rows:
                    connection.execute(f"INSERT INTO {name} VALUES ({marks})", row)

    def tampered(self, how: Callable[[Connection], None], heads: str = "") -> AuditReport:
        self.put_back()
        with self.records.writing() as connection:
            how(connection)
        return self.dispatcher.call("audit.verify", {"heads": heads})


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "postgres":
            patch.setenv("MILLRACE_RECORDS_URL", new_records_url())
        dispatcher = open_dispatcher(str(tmp_path_factory.mktemp("ground") / "home"))
    made = Ground(dispatcher)
    yield made
    made.put_back()
    dispatcher.close()


# --------------------------------------------------------------------------- tampering, by raw SQL

Change = Callable[[Connection, int], None]


def edit(column: str, value: Any) -> Change:
    def change(connection: Connection, place: int) -> None:
        connection.execute(f"UPDATE events SET {column} = ? WHERE seq = ?", (value, place))

    return change


def edit_detail(column: str, value: Any) -> Change:
    sql = f"UPDATE event_details SET {column} = ? WHERE event_id = (SELECT id FROM events WHERE seq = ?)"
    return lambda connection, place: (connection.execute(sql, (value, place)), None)[1]


def drop_detail(connection: Connection, place: int) -> None:
    connection.execute("DELETE FROM event_details WHERE event_id = (SELECT id FROM events WHERE seq = ?)", (place,))


def delete(connection: Connection, place: int) -> None:
    connection.execute("DELETE FROM events WHERE seq = ?", (place,))


def delete_some(connection: Connection, place: int) -> None:
    connection.execute("DELETE FROM events WHERE seq >= ? AND seq < ?", (place, place + 5))


def unseal(connection: Connection, place: int) -> None:
    connection.execute("UPDATE events SET seq = NULL, chain = NULL WHERE seq = ?", (place,))


def truncate(connection: Connection, place: int) -> None:
    connection.execute("DELETE FROM events WHERE seq >= ?", (place,))


def chain_of(connection: Connection, place: int) -> str:
    row = connection.execute("SELECT chain FROM events WHERE seq = ?", (place,)).fetchone()
    return row[0] if row else "0" * 64


def roll_back_head(connection: Connection, place: int) -> None:
    text = f"{place - 1} {chain_of(connection, place - 1)}"
    connection.execute("UPDATE meta SET value = ? WHERE key = 'chain_head'", (text,))


def truncate_and_roll_back(connection: Connection, place: int) -> None:
    roll_back_head(connection, place)
    truncate(connection, place)


def truncate_all_traces(connection: Connection, place: int) -> None:
    """Also the signed heads that tell: only a published one is left."""
    truncate_and_roll_back(connection, place)
    connection.execute("DELETE FROM audit_heads WHERE size >= ?", (place,))


def swap(connection: Connection, place: int) -> None:
    other = place - 1 if place > 1 else place + 1
    for old, new in ((place, SIZE + 50), (other, place), (SIZE + 50, other)):
        connection.execute("UPDATE events SET seq = ? WHERE seq = ?", (new, old))


def rechain(connection: Connection, place: int) -> None:
    """Compute every digest from a place on anew, by the documented formulas; the stored head too."""
    digest = chain_of(connection, place - 1)
    rows = connection.execute(
        "SELECT seq, at, actor, verb, subject, commitment FROM events WHERE seq >= ? ORDER BY seq", (place,)
    ).fetchall()
    for row in rows:
        link = json.dumps(list(row), separators=(",", ":"), ensure_ascii=False).encode()
        digest = hashlib.sha256(bytes.fromhex(digest) + link).hexdigest()
        connection.execute("UPDATE events SET chain = ? WHERE seq = ?", (digest, row[0]))
    connection.execute("UPDATE meta SET value = ? WHERE key = 'chain_head'", (f"{rows[-1][0]} {digest}",))


def rewrite(connection: Connection, place: int) -> None:
    edit("actor", "user:somebody-else")(connection, place)
    rechain(connection, place)


def remove_and_rewrite(connection: Connection, place: int) -> None:
    """Take an event out and close the gap."""
    delete(connection, place)
    for seq in range(place + 1, SIZE + 1):
        connection.execute("UPDATE events SET seq = ? WHERE seq = ?", (seq - 1, seq))
    if place < SIZE:
        rechain(connection, place)
    else:
        roll_back_head(connection, place)


def insert(connection: Connection, place: int) -> None:
    """Put an event in, and make room for it."""
    for seq in range(SIZE, place - 1, -1):
        connection.execute("UPDATE events SET seq = ? WHERE seq = ?", (seq + 1, seq))
    sql = "INSERT INTO events (id, seq, at, actor, verb, subject, commitment, chain) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
    connection.execute(sql, (9999, place, 1.5, "user:eve", "run.end", "run:x", "0" * 64, "0" * 64))


def insert_and_rewrite(connection: Connection, place: int) -> None:
    insert(connection, place)
    rechain(connection, place)


def roll_back_rows(connection: Connection, place: int) -> None:
    """An older state with other events after it, as many as before."""
    edit("subject", "run:another")(connection, place)
    connection.execute("UPDATE events SET actor = 'user:eve' WHERE seq > ?", (place,))
    rechain(connection, place)


BY_CHAIN: dict[str, Change] = {
    "at": edit("at", 1.25), "actor": edit("actor", "user:eve"), "verb": edit("verb", "run.nothing"),
    "subject": edit("subject", ""), "commitment": edit("commitment", "0" * 64), "chain": edit("chain", "f" * 64),
    "digest that is none": edit("chain", "?"), "detail": edit_detail("detail", '{"n":99}'),
    "salt": edit_detail("salt", b"x" * 32), "no detail": drop_detail, "delete": delete, "delete some": delete_some,
    "unseal": unseal, "truncate": truncate, "head rolled back": roll_back_head, "insert": insert,
}  # fmt: skip
BY_HEADS: dict[str, Change] = {
    "truncate and roll back": truncate_and_roll_back, "rewrite": rewrite, "remove and rewrite": remove_and_rewrite,
    "insert and rewrite": insert_and_rewrite, "roll back rows": roll_back_rows,
}  # fmt: skip


def located(report: AuditReport, place: int) -> bool:
    return not report.is_whole and any(one.first <= place <= one.last for one in report.breaks)


def test_a_good_chain_is_whole(ground: Ground) -> None:
    report = ground.tampered(lambda _: None, ground.published)
    assert (report.is_whole, report.events, report.heads, report.proven) == (True, SIZE, 3, SIZE)
    assert (report.erased, report.unsealed, len(report.keys), report.breaks) == (0, 0, 1, [])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(BY_CHAIN)), st.integers(1, SIZE))
def test_what_somebody_does_to_rows_is_found_at_its_place(ground: Ground, kind: str, place: int) -> None:
    report = ground.tampered(lambda connection: BY_CHAIN[kind](connection, place))
    assert located(report, place), report.breaks
    cut = [one for one in report.breaks if one.explanation.startswith("the events end")]
    assert all(one.first > (place - 1) // 8 * 8 for one in cut), "what an earlier head proves is not blamed"
    blamed = [one.first for one in report.breaks if one not in cut]
    assert not blamed or min(blamed) == place, "nothing before it is blamed"
    exact = ("truncate", "head rolled back", "insert", "delete some")
    if kind not in exact:
        assert set(blamed) <= {place}, "nothing after it is blamed"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(BY_HEADS)), st.integers(1, SIZE))
@example("remove and rewrite", SIZE)
def test_what_keeps_the_chain_whole_is_found_by_signed_heads(ground: Ground, kind: str, place: int) -> None:
    report = ground.tampered(lambda connection: BY_HEADS[kind](connection, place))
    assert located(report, place), report.breaks
    first = report.breaks[0]
    assert first.first > (place - 1) // 8 * 8, "events that an earlier head proves are not blamed"
    assert {one.problem for one in report.breaks} & {"rewritten", "cut", "extra"}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, SIZE))
def test_events_that_were_removed_with_all_traces_are_found_by_a_published_head(ground: Ground, place: int) -> None:
    def how(connection: Connection) -> None:
        truncate_all_traces(connection, place)

    assert ground.tampered(how).is_whole, "nothing here can know"
    one_line = ground.published.splitlines()[-1]
    assert located(ground.tampered(how, one_line), place), "one head is enough"


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, SIZE))
def test_swapped_events_are_found(ground: Ground, place: int) -> None:
    report = ground.tampered(lambda connection: swap(connection, place))
    assert located(report, min(place, place - 1 if place > 1 else place + 1))


@pytest.mark.parametrize("size", [8, 16])
def test_a_signed_head_that_is_gone_is_found(ground: Ground, size: int) -> None:
    report = ground.tampered(lambda connection: (connection.execute("DELETE FROM audit_heads WHERE size = ?", (size,)),
                                                 None)[1])  # fmt: skip
    assert [one.problem for one in report.breaks] == ["head"]
    assert located(report, size)
    last = ground.tampered(lambda connection: (connection.execute("DELETE FROM audit_heads WHERE size = 24"), None)[1],
                           ground.published)  # fmt: skip
    assert "not stored any more" in last.breaks[0].explanation


@pytest.mark.parametrize("field", ["root", "chain", "created_at", "signature"])
def test_a_signed_head_that_was_altered_is_found(ground: Ground, field: str) -> None:
    def how(connection: Connection) -> None:
        (body,) = connection.execute("SELECT body FROM audit_heads WHERE size = 16").fetchone()
        value = json.loads(body)
        value[field] = value[field] + 1 if field == "created_at" else value[field].replace("a", "b").replace("1", "2")
        connection.execute("UPDATE audit_heads SET body = ? WHERE size = 16", (json.dumps(value),))

    report = ground.tampered(how)
    assert located(report, 16)
    assert {one.problem for one in report.breaks} <= {"signature", "head"}


def test_heads_by_a_key_that_is_not_trusted_are_refused(ground: Ground, tmp_path: Path) -> None:
    stranger = open_dispatcher(str(tmp_path / "stranger"))
    append(ledger(stranger.services), 3)
    signed = sign_now(stranger.services)
    assert signed is not None
    report = ground.tampered(lambda _: None, as_line(signed).decode())
    stranger.close()
    assert "signature" in {one.problem for one in report.breaks}
    assert "not trusted" in " ".join(one.explanation for one in report.breaks)


@pytest.mark.parametrize("value", ["", "x", "12 ab", "-1 " + "0" * 64])
def test_a_stored_head_that_is_none_is_found_and_nothing_is_sealed_after_it(ground: Ground, value: str) -> None:
    def how(connection: Connection) -> None:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'chain_head'", (value,))

    report = ground.tampered(how)
    assert [one.problem for one in report.breaks] == ["head"]
    with pytest.raises(CorruptError, match="stored head"):
        append(ground.records, 1)
    ground.put_back()


def test_nothing_is_sealed_after_a_head_that_was_rolled_back(ground: Ground) -> None:
    ground.tampered(lambda connection: roll_back_head(connection, 20))
    with pytest.raises(CorruptError, match="events after 19"):
        append(ground.records, 1)
    ground.put_back()


def test_several_breaks_are_told_at_once(ground: Ground) -> None:
    def how(connection: Connection) -> None:
        for place in (3, 9, 17):
            edit("actor", "user:eve")(connection, place)
        edit_detail("detail", "{}")(connection, 12)
        delete(connection, 20)

    report = ground.tampered(how)
    assert [(one.first, one.problem) for one in report.breaks] == [
        (3, "altered"), (9, "altered"), (12, "detail"), (17, "altered"), (20, "missing"),
    ]  # fmt: skip


def test_nothing_is_signed_over_events_that_were_altered(ground: Ground) -> None:
    ground.tampered(lambda connection: rewrite(connection, 5))
    append(ground.records, 1, SIZE)
    with pytest.raises(CorruptError, match="nothing is signed"):
        sign_now(ground.dispatcher.services)
    ground.put_back()
    append(ground.records, 4, SIZE)
    with ground.records.writing() as connection:
        edit("actor", "user:eve")(connection, SIZE + 2)
    with pytest.raises(CorruptError, match=f"event {SIZE + 2} .* altered"):
        sign_now(ground.dispatcher.services)
    ground.put_back()


# --------------------------------------------------------------------------- proofs


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    dispatcher = open_dispatcher(str(tmp_path / "home"))
    yield dispatcher
    dispatcher.close()


def test_a_proof_holds_without_the_events_and_only_as_it_is(ground: Ground, tmp_path: Path) -> None:
    ground.put_back()
    made = ground.dispatcher.call("audit.prove", {"event": 11, "since": 8, "with_detail": True})
    text = msgspec.json.encode(made).decode()
    checked = ground.dispatcher.call("audit.check", {"proof": text, "heads": ground.published})
    assert (checked.event, checked.subject, checked.size, checked.detail) == (11, "run:10", 16, {"n": 10})
    old_only = ground.published.splitlines()[0]  # grown out of the head over 8, which somebody has kept
    assert ground.dispatcher.call("audit.check", {"proof": text, "heads": old_only}).event == 11
    with pytest.raises(UntrustedError, match="none of those"):
        ground.dispatcher.call("audit.check", {"proof": text, "heads": ground.published.splitlines()[2]})
    document = json.loads(text)
    for name, value in (("event", 12), ("leaf", made.leaf.replace("run:10", "run:99")), ("path", made.path[1:]),
                        ("detail", '{"n":11}')):  # fmt: skip
        with pytest.raises(CorruptError):
            ground.dispatcher.call("audit.check", {"proof": json.dumps(document | {name: value})})
    forged = document | {"head": document["head"] | {"at": 5.0}}
    with pytest.raises(UntrustedError):
        ground.dispatcher.call("audit.check", {"proof": json.dumps(forged)})
    with pytest.raises(InputError, match="no proof"):
        ground.dispatcher.call("audit.check", {"proof": "{}"})


def test_an_event_that_no_head_covers_is_signed_for_when_its_proof_is_wanted(home: Dispatcher) -> None:
    records = ledger(home.services)
    append(records, 3)
    made = home.call("audit.prove", {"event": 2})
    assert made.head.size == 3
    assert (made.salt, made.detail) == (None, None)
    assert home.call("audit.verify", {}).proven == 3
    with pytest.raises(NotFoundError):
        home.call("audit.prove", {"event": 4})
    with pytest.raises(InputError, match="up to 3"):
        home.call("audit.prove", {"event": 1, "since": 4})


def test_the_documented_check_of_a_proof_works(
    home: Dispatcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    append(ledger(home.services), 13)
    page = (Path(__file__).parents[2] / "docs/how-to/audit.md").read_text(encoding="utf-8")
    code = page.split("```python\n", 1)[1].split("```", 1)[0]
    for event in (1, 7, 13):
        proof = msgspec.json.encode(home.call("audit.prove", {"event": event})).decode()
        (tmp_path / "event-17.json").write_text(proof)
        exec(compile(code, "audit.md", "exec"), {})
        (tmp_path / "event-17.json").write_text(proof.replace("run:", "ran:"))
        with pytest.raises(AssertionError):
            exec(compile(code, "audit.md", "exec"), {})


# --------------------------------------------------------------------------- retention


def test_old_details_are_erased_and_the_chain_says_so_and_verifies(ground: Ground, monkeypatch: Any) -> None:
    ground.put_back()
    clock = FakeClock(100.0 + 10 * 1.0 + 86_400 * 30)  # events 1 to 10 are older than 30 days
    monkeypatch.setattr(ground.dispatcher.services, "clock", clock)
    asked = ground.dispatcher.call("audit.retain", {"days": 30})
    assert (asked.details, asked.last_event, asked.applied) == (10, 10, False)
    assert ground.dispatcher.call("audit.verify", {}).erased == 0
    assert ground.dispatcher.call("audit.retain", {"days": 30, "apply": True}).applied
    report = ground.dispatcher.call("audit.verify", {"heads": ground.published})
    assert (report.is_whole, report.erased) == (True, 10)
    (said,) = ground.dispatcher.call("audit.search", {"verb": "audit.erased"})
    assert (said.detail["erased"], said.detail["retention_days"]) == ([[1, 10]], 30)
    clock.sleep(86_400 * 400)
    ground.dispatcher.call("audit.retain", {"days": 0, "apply": True})
    assert ground.dispatcher.call("audit.verify", {}).is_whole, "events that tell of erasures keep their detail"
    with ground.records.writing() as connection:
        connection.execute("DELETE FROM event_details")
    breaks = ground.dispatcher.call("audit.verify", {}).breaks
    assert {(one.first, one.last, one.problem) for one in breaks} == {(1, SIZE + 2, "erased")}
    with pytest.raises(InputError, match="number of days"):
        ground.dispatcher.call("audit.retain", {"days": -1})
    ground.put_back()


@given(st.sets(st.integers(1, 60)))
def test_stretches_are_those_numbers(numbers: set[int]) -> None:
    stretches = as_stretches(sorted(numbers))
    assert {one for first, last in stretches for one in range(first, last + 1)} == numbers
    assert all(later[0] > earlier[1] + 1 for earlier, later in itertools.pairwise(stretches))


# --------------------------------------------------------------------------- searches and exports


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["", "user:u1", "user:*", "nobody"]), st.sampled_from(["", "run.end", "run.*"]),
    st.sampled_from(["", "run:7", "run:1*"]), st.integers(1, SIZE), st.integers(1, SIZE), st.sampled_from(["", "N\":1"]),
)  # fmt: skip
def test_searches_find_what_fits_newest_first_page_by_page(
    ground: Ground, actor: str, verb: str, subject: str, since: int, until: int, text: str
) -> None:
    def fits(value: str, wanted: str) -> bool:
        return value.startswith(wanted[:-1]) if wanted.endswith("*") else wanted in ("", value)

    ground.put_back()
    expected = [
        seq for seq in range(SIZE, 0, -1)
        if fits(f"user:u{(seq - 1) % 3}", actor) and fits("run.end", verb) and fits(f"run:{seq - 1}", subject)
        and since <= seq < until and (not text or str(seq - 1).startswith("1"))
    ]  # fmt: skip
    query = {
        "actor": actor, "verb": verb, "subject": subject, "text": text,
        "since": f"1970-01-01T00:01:{39 + since:02d}Z" if since < 21 else f"1970-01-01T00:02:{since - 21:02d}Z",
        "until": f"1970-01-01T00:01:{39 + until:02d}Z" if until < 21 else f"1970-01-01T00:02:{until - 21:02d}Z",
    }  # fmt: skip
    query["text"] = "run:1" if text else ""
    if text:
        expected = [seq for seq in expected if str(seq - 1).startswith("1")]
    found: list[int] = []
    before: int | None = None
    while True:
        page = ground.dispatcher.call("audit.search", {**query, "limit": 3, "before": before})
        found += [one.seq for one in page]
        if len(page) < 3:
            break
        before = page[-1].seq
    assert found == expected
    exported = [line.event.seq for line in ground.dispatcher.stream("audit.export", query) if line.event]
    assert exported == expected[::-1]


@pytest.mark.parametrize("text", ["%", "_", "\\", '"quoted"', "É", "né", "' OR 1=1 --"])
def test_any_text_is_found_as_it_stands(ground: Ground, text: str) -> None:
    ground.put_back()
    append(ground.records, 1, 80, detail={"note": f"x{text}y"})
    append(ground.records, 1, 81, subject=f"run:{text}")
    found = ground.dispatcher.call("audit.search", {"text": text})
    assert [one.seq for one in found] == [SIZE + 2, SIZE + 1]
    ground.put_back()


def test_an_export_has_the_heads_and_verifies_the_home_it_came_from(ground: Ground) -> None:
    ground.put_back()
    lines = list(ground.dispatcher.stream("audit.export", {}))
    events, signed = [line.event for line in lines if line.event], [line.head for line in lines if line.head]
    assert ([one.seq for one in events], [head.size for head in signed]) == (list(range(1, SIZE + 1)), [8, 16, 24])
    text = "\n".join(msgspec.json.encode(line.event or line.head).decode() for line in lines)
    assert ground.dispatcher.call("audit.verify", {"heads": text}).is_whole
    detail = msgspec.json.encode(events[4].detail, order="deterministic")
    assert hmac.new(bytes.fromhex(events[4].salt or ""), detail, hashlib.sha256).hexdigest() == events[4].commitment


@pytest.mark.parametrize("given_text", ["yesterday", "2026-13-01", "", "12"])
def test_a_time_that_is_none_is_refused(home: Dispatcher, given_text: str) -> None:
    _ = home.services.records
    with pytest.raises(InputError, match="want a d"):
        home.call("audit.search", {"since": given_text})


@given(st.text())
def test_no_cell_is_a_formula(text: str) -> None:
    cell = safe_cell(text)
    is_number = re.fullmatch(r"[-+]?[0-9.]+(e[+-]?[0-9]+)?", cell, re.IGNORECASE)
    assert cell[:1] not in tuple("=+-@\t\r\n") or is_number
    assert cell.removeprefix("'") == text.removeprefix("'") or cell == text


# --------------------------------------------------------------------------- who may


@pytest.mark.parametrize("operation", ["audit.verify", "audit.search", "audit.export", "audit.retain", "audit.check",
                                       "audit.prove", "audit.export_subject", "audit.erase_subject"])  # fmt: skip
def test_the_audit_is_for_owners_of_everything(home: Dispatcher, operation: str) -> None:
    body = {"audit.retain": {"days": 1}, "audit.check": {"proof": ""}, "audit.prove": {"event": 1},
            "audit.export_subject": {"subject": "ada"}, "audit.erase_subject": {"subject": "ada"}}.get(operation, {})  # fmt: skip
    _ = home.services.records
    append(ledger(home.services), 1)
    refused = [Grant(role=role) for role in ("maintainer", "developer", "operator", "viewer")]
    for grant in (*refused, Grant(role="owner", where="one-project")):
        if operation == "audit.check" and grant.role == "owner":
            continue  # says nothing about events here
        with acting_as(Principal(id="user:eve", grants=(grant,))), pytest.raises(DeniedError):
            list(home.stream(operation, body)) if operation == "audit.export" else home.call(operation, body)
    home.services.records.seal()
    denied = home.call("audit.search", {"actor": "user:eve", "verb": operation})
    assert len(denied) >= 4, "denied attempts are events"
    assert {one.detail["outcome"] for one in denied} == {"auth.denied"}
    assert "ada" not in json.dumps([one.detail for one in denied]), "without the name that was asked about"
