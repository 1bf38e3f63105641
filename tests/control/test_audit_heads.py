"""Signed heads: made by the leader, published in order, none lost, nowhere that only this machine can reach."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme

from millrace.control.dispatch import Dispatcher
from millrace.control.head_publishing import append_lines, public_address, publish_pending
from millrace.control.heads import HeadSigner, as_line, ledger, parse_heads, sign_now
from millrace.control.loop import Loop, take_lead
from millrace.core.clock import FakeClock
from millrace.core.errors import (
    ConflictError,
    InputError,
    UnavailableError,
)
from millrace.core.types import AuditHead, Event
from millrace.store.records_sql import SqlRecords
from millrace.wiring import open_dispatcher


def append(records: SqlRecords, count: int, first: int = 0, **fields: Any) -> None:
    with records.transaction() as transaction:
        for number in range(first, first + count):
            values = {"at": 100.0 + number, "actor": f"user:u{number % 3}", "verb": "run.end",
                      "subject": f"run:{number}", "detail": {"n": number}}  # fmt: skip
            transaction.append(Event(**(values | fields)))
    records.seal()


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Dispatcher]:
    dispatcher = open_dispatcher(str(tmp_path / "home"))
    yield dispatcher
    dispatcher.close()


def test_the_leader_signs_a_head_every_interval_when_there_are_new_events(home: Dispatcher) -> None:
    services = home.services
    services.clock = clock = FakeClock()
    records = ledger(services)
    lease = take_lead(services)
    assert lease is not None
    signer = HeadSigner(services)

    def sizes() -> list[int]:
        return [head.size for head in records.find(AuditHead, order="size")]

    signer(lease)
    assert sizes() == []
    append(records, 3)
    signer(lease)
    assert sizes() == [], "the interval is not over"
    clock.sleep(61)
    signer(lease)
    signer(lease)
    clock.sleep(61)
    signer(lease)
    assert sizes() == [3], "nothing is new"
    append(records, 4)
    clock.sleep(61)
    HeadSigner(services)(lease)  # another process goes on where this one stopped
    signer(lease)
    assert sizes() == [3, 7]
    assert home.call("audit.verify", {}).is_whole
    append(records, 1)
    clock.sleep(61)
    with pytest.raises(ConflictError):
        signer(msgspec.structs.replace(lease, token=lease.token - 1))
    assert sizes() == [3, 7], "a leader that was replaced signs nothing"


def test_many_events_are_taken_in_over_several_ticks(home: Dispatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("millrace.store.audit_sql.BATCH", 4)
    records = ledger(home.services)
    append(records, 30)
    lease = take_lead(home.services)
    assert lease is not None
    signer, ticks = HeadSigner(home.services), 0
    while not records.find(AuditHead):
        signer(lease)
        ticks += 1
        append(records, 1, 30 + ticks)
    assert ticks == 4
    assert records.find(AuditHead)[0].size == 30
    assert home.call("audit.verify", {}).is_whole


def test_the_loop_signs_and_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tmp_path / "heads.jsonl"
    monkeypatch.setenv("MILLRACE_AUDIT_PUBLISH", str(kept))
    monkeypatch.setenv("MILLRACE_AUDIT_HEAD_INTERVAL_S", "0.01")
    dispatcher = open_dispatcher(str(tmp_path / "home"))
    records = ledger(dispatcher.services)
    loop = Loop(dispatcher.services)
    thread = threading.Thread(target=loop.run)
    thread.start()
    try:
        append(records, 5)
        wait_for(lambda: kept.exists() and parse_heads(kept.read_text()))
    finally:
        loop.stop()
        thread.join()
    assert parse_heads(kept.read_text())[-1].size == 5
    assert dispatcher.call("audit.verify", {"heads": kept.read_text()}).is_whole
    dispatcher.close()


def wait_for(check: Callable[[], object], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def publishing(home: Dispatcher, target: str, **more: Any) -> int:
    values = home.services.settings
    for name, value in {"audit_publish": target, **more}.items():
        values[name] = msgspec.structs.replace(values[name], value=value)  # type: ignore[index]
    return publish_pending(home.services, ledger(home.services), as_line)


def sign_some(home: Dispatcher, count: int) -> None:
    for _ in range(count):
        append(ledger(home.services), 1)
        sign_now(home.services)


def test_heads_go_to_a_file_in_order_and_none_is_lost(home: Dispatcher, tmp_path: Path) -> None:
    sign_some(home, 2)
    with pytest.raises(UnavailableError, match="No such file"):
        publishing(home, str(tmp_path / "away" / "heads.jsonl"))
    (tmp_path / "away").mkdir()
    sign_some(home, 1)
    kept = tmp_path / "away" / "heads.jsonl"
    assert publishing(home, str(kept)) == 3
    assert publishing(home, str(kept)) == 0
    sign_some(home, 1)
    with kept.open("ab") as file:  # what was cut off when the machine stopped
        file.write(as_line(ledger(home.services).find(AuditHead, order="-size")[0])[:40])
    assert publishing(home, str(kept)) == 1
    assert [head.size for head in parse_heads(kept.read_text())] == [1, 2, 3, 4]
    assert home.call("audit.verify", {"heads": kept.read_text()}).is_whole
    assert publishing(home, str(tmp_path / "another.jsonl")) == 4, "a new place gets all"


def test_lines_are_appended_and_other_lines_refused(tmp_path: Path) -> None:
    append_lines(tmp_path / "f", [b"{}"])
    append_lines(tmp_path / "f", [b"[]"])
    assert (tmp_path / "f").read_bytes() == b"{}\n[]\n"
    with pytest.raises(InputError, match="line 1 of the heads"):
        parse_heads("nonsense\n")


class Webhook:
    """A server with a certificate for localhost; answers what it is told to."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca_file = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca_file)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("localhost").configure_cert(context)
        self.answers, self.got = [200], list[tuple[str, bytes]]()
        webhook = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                webhook.got.append((self.headers["Host"], body))
                status = webhook.answers.pop(0) if len(webhook.answers) > 1 else webhook.answers[0]
                self.send_response(status)
                if status == 302:
                    self.send_header("Location", "http://169.254.169.254/latest")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


@pytest.fixture
def webhook(tmp_path: Path) -> Iterator[Webhook]:
    made = Webhook(tmp_path)
    yield made
    made.close()


def test_heads_go_to_a_webhook_and_are_sent_again_until_it_takes_them(home: Dispatcher, webhook: Webhook) -> None:
    sign_some(home, 2)
    target, allowed = f"https://localhost:{webhook.port}/heads?key=1", {"audit_publish_local": 1}
    trusting = {**allowed, "ca_file": webhook.ca_file}
    with pytest.raises(InputError, match="not an address to call"):
        publishing(home, target, audit_publish_local=0)
    with pytest.raises(UnavailableError, match="certificate"):
        publishing(home, target, **allowed)
    webhook.answers = [200, 500, 302, 200]
    with pytest.raises(UnavailableError, match="answers 500"):
        publishing(home, target, **trusting)
    with pytest.raises(UnavailableError, match="answers 302"):
        publishing(home, target, **trusting)  # a redirect is not followed
    assert publishing(home, target, **trusting) == 1
    assert publishing(home, target, **trusting) == 0
    heads = [json.loads(body) for _, body in webhook.got]
    assert [head["size"] for head in heads] == [1, 2, 2, 2]
    assert {host for host, _ in webhook.got} == {f"localhost:{webhook.port}"}


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "::1", "169.254.169.254", "fe80::1", "0.0.0.0", "::ffff:127.0.0.1", "224.0.0.1"]
)
def test_a_webhook_may_not_be_this_machine_or_what_only_it_can_reach(host: str) -> None:
    with pytest.raises(InputError, match="not an address to call"):
        public_address(host, 443, False)


@pytest.mark.parametrize("target", ["http://example.com/", "ftp://example.com/", "https:///path"])
def test_a_webhook_is_https(home: Dispatcher, target: str) -> None:
    sign_some(home, 1)
    with pytest.raises(InputError, match="audit_publish"):
        publishing(home, target)
