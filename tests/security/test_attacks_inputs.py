"""Attacks by what is named: addresses and paths to call or to read, and texts for databases.

Where each comes from: CWE-918 and OWASP API7:2023 (requests forged by the server: addresses in other notations, by
redirect, by DNS rebinding; the metadata of clouds, as of Capital One in 2019), CVE-2023-43472 and CVE-2024-1594 of
MLflow (`file:` in artifact locations), CVE-2024-0964 of Gradio, CWE-36 and CWE-610 (files elsewhere); CWE-89 (SQL, also
in MLflow's filters).
"""

from __future__ import annotations

import http.server
import json
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trustme
from attacked import Client, Site, filled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from millrace.control.head_publishing import public_address, publish_pending
from millrace.control.heads import sign_now
from millrace.core.addresses import may_be_called
from millrace.core.errors import InputError, MillraceError, UnavailableError
from millrace.core.operations.table import OPERATIONS
from millrace.core.types import Event
from millrace.formats.mlflow.rest import RestSource
from millrace.store import sqlite
from millrace.wiring import open_dispatcher

PLACES = [
    "file:///etc/passwd", "FILE:/etc/passwd", "file://localhost/etc/passwd", "/etc/passwd", "../../../../etc/passwd",
    "s3://somebody-elses-bucket/data.csv", "gs://somebody-elses/data", "az://somebody-elses/data",
    "http://127.0.0.1:{port}/", "https://[::1]:{port}/", "http://0.0.0.0:{port}/", "http://2130706433:{port}/",
    "http://0x7f000001:{port}/", "http://0177.0.0.1:{port}/", "http://127.1:{port}/", "http://[::ffff:127.0.0.1]:{port}/",
    "http://169.254.169.254/latest/meta-data/", "http://localhost:{port}/", "ftp://127.0.0.1:{port}/", "gopher://127.0.0.1:{port}/",
    "sqlite:////etc/passwd", "postgresql://127.0.0.1:{port}/x", "env:PATH", "command:id", "jar:file:///etc/passwd!/",
]  # fmt: skip

# --------------------------------------------------------------------------- places to call or to read


class Canary:
    """A server on loopback that nobody may call; it redirects to itself whoever does."""

    def __init__(self, context: ssl.SSLContext | None = None, location: str = "") -> None:
        self.calls: list[str] = []
        canary = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                canary.calls.append(self.path)
                self.rfile.read(int(self.headers.get("Content-Length", "0")))
                self.send_response(307)
                self.send_header("Location", location or "/again")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_POST = do_PUT = do_HEAD = do_GET

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture(scope="module")
def canary() -> Iterator[Canary]:
    made = Canary()
    yield made
    made.close()


@pytest.fixture
def no_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every address that this process connects to or looks up; nothing is reached."""
    seen: list[Any] = []

    def note(*given: Any, **_: Any) -> Any:
        seen.append(given)
        raise OSError("no network here")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, note)
    monkeypatch.setattr(socket, "getaddrinfo", note)
    monkeypatch.setattr(subprocess, "Popen", note)
    return seen


def bodies(value: str) -> dict[str, Any]:
    """A value in every field that holds a text, of all operations and of MLflow's routes."""
    fields: dict[str, Any] = {}
    for operation in OPERATIONS.values():
        for field in msgspec.structs.fields(operation.request):
            fields.setdefault(field.name, value)
    mlflow = (
        "source",
        "artifact_location",
        "artifact_path",
        "artifact_uri",
        "location",
        "download_uri",
        "storage_location",
    )
    return {**fields, **dict.fromkeys(mlflow, value)}


@pytest.mark.parametrize("place", [PLACES[at] for at in (0, 3, 5, 8, 9, 16)])
def test_no_field_makes_the_server_call_or_read_a_place(
    site: Site, canary: Canary, no_calls: list[Any], place: str
) -> None:
    """Every route, with the place in every field of it, as who has a project and nothing of the machine."""
    everything = bodies(place.format(port=canary.port))
    asked = {(one.method, f"/api/v1{one.path}"): one for one in OPERATIONS.values()}
    client = site.client(site.tokens["main"])
    for method, path in site.routes():
        if "/stream" in path:
            continue
        body: dict[str, Any] = {**everything, "run_id": site.ids["mine"], "name": "n"}
        if (method, path) in asked:
            names = {field.name for field in msgspec.structs.fields(asked[method, path].request)}
            body = {name: "mine" if name == "project" else body[name] for name in names}
        sent: dict[str, Any] = {"params": body} if method in ("GET", "HEAD", "DELETE") else {"json": body}
        answer = client.request(method, filled(path, "x"), follow_redirects=False, **sent)
        assert "root:" not in answer.text, (method, path)
        assert answer.status_code < 500 or answer.status_code == 501, (method, path, answer.text)
    assert no_calls == []
    assert canary.calls == []


def test_operations_that_name_places_are_refused_one_by_one(site: Site, canary: Canary, no_calls: list[Any]) -> None:
    """With everything else right, so that the place alone is what is wrong."""
    client = site.client(site.tokens["main"])
    run = site.ids["mine"]
    for place in [one.format(port=canary.port) for one in PLACES]:
        for path, body in (
            ("runs", {"spec_path": place}), ("runs/plan", {"spec_path": place}),
            (f"runs/{run}/artifacts", {"name": "a", "path": place}),
            ("models", {"path": place}), ("models/compress", {"path": place, "data": place, "label": "y"}),
            ("models/none@1/export", {"to": place}), ("system/backups", {"to": place}),
            ("system/backups/verify", {"source": place}), ("system/backups/drill", {"source": place}),
            ("system/backups/restore", {"source": place}), ("system/backups/prune", {"to": place}),
            ("system/import/mlflow", {"source": place}),
        ):  # fmt: skip
            answer = client.post(f"/api/v1/{path}", json=body)
            assert answer.status_code == 403, (path, place, answer.text)
        assert client.get("/api/v1/system/backups", params={"to": place}).status_code == 403
    assert no_calls == []


@pytest.mark.parametrize("place", PLACES)
def test_mlflow_versions_and_experiments_read_nothing(
    site: Site, canary: Canary, no_calls: list[Any], place: str
) -> None:
    """What names a disk of the server is refused; another store is kept as a name, and never opened."""
    client = site.client(site.tokens["owner"])
    value = place.format(port=canary.port)
    name = f"m{abs(hash(place))}"
    assert client.post("/api/2.0/mlflow/registered-models/create", json={"name": name}).status_code == 200
    made = client.post("/api/2.0/mlflow/model-versions/create", json={"name": name, "source": value})
    is_disk = re.match(r"(?i)file:|/|\.\.|ftp:", value) is not None
    assert made.status_code == (400 if is_disk else 200), made.text
    experiment = client.post("/api/2.0/mlflow/experiments/create", json={"name": name, "artifact_location": value})
    assert experiment.status_code in ((400,) if re.match(r"(?i)file:|/|\.\.", value) else (200, 400)), experiment.text
    if made.status_code == 200:
        for url in (f"/api/2.0/mlflow/model-versions/get-download-uri?name={name}&version=1", f"/models/{name}/versions/1",
                    f"/api/2.0/mlflow/model-versions/get?name={name}&version=1"):  # fmt: skip
            assert "root:" not in client.get(url).text
        assert site.client(site.tokens["owner"]).post(f"/api/v1/models/{name}@1/open", json={}).status_code >= 400
    assert no_calls == []


def uploaded(client: Client, source: str) -> str:
    """A spec in an uploaded folder, as a client sends it."""
    entries = []
    spec = f"project: mine\ndata: {{source: {json.dumps(source)}, label: y}}\n"
    for path, text in {"millrace.yaml": spec, "rows.csv": "x,y\n1,a\n2,b\n"}.items():
        stored = client.request("POST", "/api/v1/blobs", content=text.encode()).json()
        entries.append({"path": path, "digest": stored["digest"], "size_bytes": stored["size_bytes"]})
    tree = client.post("/api/v1/trees", json={"entries": entries}).json()
    return f"tree:{tree['digest']}/millrace.yaml"


@pytest.mark.parametrize(
    "source",
    ["../*/rows.csv", "../../blobs", "*/../../*/*.csv", "../..", "{home}", "{home}/keys", "{above}/*/projects/*/*.csv", "{above}",
     "../../keys/signing.key", "rows.csv/../../../records.db", "{home}/../{name}/keys"],
)  # fmt: skip
def test_data_of_a_run_is_never_taken_out_of_the_home(site: Site, no_calls: list[Any], source: str) -> None:
    """Where the uploads and blobs of other projects are, and the keys."""
    home = site.home.services.home
    client = site.client(site.tokens["dev"])
    spec = uploaded(client, source.format(home=home, above=home.parent, name=home.name))
    for path in ("/api/v1/runs", "/api/v1/runs/plan"):
        answer = client.post(path, json={"spec_path": spec})
        assert answer.status_code == 403, (path, answer.text)
        assert "leads into the home" in answer.text
    assert client.post("/api/v1/runs/plan", json={"spec_path": uploaded(client, "rows.csv")}).status_code == 200
    assert client.post("/api/v1/runs/plan", json={"spec_path": uploaded(client, "*.csv")}).status_code == 200


@pytest.mark.parametrize(
    "place", [one for one in PLACES if "://" in one or "FILE" in one or ":" in one.partition("/")[0]]
)
def test_data_of_a_run_is_no_url(site: Site, canary: Canary, no_calls: list[Any], place: str) -> None:
    client = site.client(site.tokens["dev"])
    spec = uploaded(client, place.format(port=canary.port))
    for path in ("/api/v1/runs", "/api/v1/runs/plan"):
        answer = client.post(path, json={"spec_path": spec})
        assert answer.status_code == 422, (path, answer.text)
        assert answer.json()["code"] == "data.invalid"
    assert no_calls == []


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "localhost", "0.0.0.0", "0",
     "::1", "::", "::ffff:127.0.0.1", "::ffff:7f00:1", "::127.0.0.1", "64:ff9b::127.0.0.1", "2002:7f00:1::", "169.254.169.254",
     "2852039166", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fe80::1%lo", "fd00:ec2::254", "100.100.100.200", "224.0.0.1",
     "ff02::1"],
)  # fmt: skip
def test_addresses_in_any_notation_are_known_for_what_they_are(host: str) -> None:
    with pytest.raises((InputError, UnavailableError)):  # unavailable: this resolver does not know the notation
        public_address(host, 443, is_local_allowed=False)


def test_the_machine_may_be_meant_its_metadata_never() -> None:
    assert may_be_called("127.0.0.1", is_local_allowed=True)
    assert public_address("127.0.0.1", 443, is_local_allowed=True) == "127.0.0.1"
    for address in ("169.254.169.254", "fe80::1", "0.0.0.0", "fd00:ec2::254", "::ffff:169.254.169.254"):
        assert not may_be_called(address, is_local_allowed=True)
        with pytest.raises(InputError, match="not an address to call"):
            public_address(address, 443, is_local_allowed=True)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["{}", "::ffff:{}", "64:ff9b::{}", "::{}"]))
def test_an_address_inside_another_is_that_address(number: int, form: str) -> None:
    plain = socket.inet_ntoa(number.to_bytes(4, "big"))
    if number > 1:  # :: and ::1 are addresses of their own
        assert may_be_called(form.format(plain)) == may_be_called(plain)


@pytest.fixture
def publishing(tmp_path: Path) -> Iterator[Any]:
    """Publishes the heads of a home to a target; its certificates are those of `ca_file`."""
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    home = open_dispatcher(str(tmp_path / "home"))
    with home.services.records.transaction() as transaction:
        transaction.append(Event(at=1.0, actor="a", verb="v", subject="s"))
    home.services.records.seal()
    sign_now(home.services)

    def publish(target: str, **more: Any) -> int:
        values: Any = home.services.settings
        for name, value in {"audit_publish": target, "ca_file": str(tmp_path / "ca.pem"), **more}.items():
            values[name] = msgspec.structs.replace(values[name], value=value)
        return publish_pending(home.services, home.services.records, lambda head: head.root.encode())  # type: ignore[arg-type]

    publish.authority = authority  # type: ignore[attr-defined]
    yield publish
    home.close()


def test_a_redirect_of_a_webhook_is_not_followed(publishing: Any, canary: Canary) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    publishing.authority.issue_cert("localhost").configure_cert(context)
    outside = Canary(context, location=f"http://127.0.0.1:{canary.port}/secret")
    try:
        with pytest.raises(UnavailableError, match="answers 307"):
            publishing(f"https://localhost:{outside.port}/", audit_publish_local=1)
        assert len(outside.calls) == 1
    finally:
        outside.close()
    assert canary.calls == []


def test_a_name_that_means_another_address_a_moment_later_gains_nothing(
    publishing: Any, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: first an address of the world, then one of this machine."""
    asked: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: Any, port: Any, *given: Any, **named: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else str(host)
        asked.append(name)
        if name == "rebinding.example":
            shown = "192.0.2.1" if asked.count(name) == 1 else "127.0.0.1"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (shown, canary.port))]
        return real(host, port, *given, **named)

    reached: list[Any] = []

    def connect(_: socket.socket, address: Any) -> None:
        reached.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket.socket, "connect", connect)
    with pytest.raises(UnavailableError):
        publishing(f"https://rebinding.example:{canary.port}/")
    assert asked.count("rebinding.example") == 1, "looked up once: what was judged is what is called"
    assert {address[0] for address in reached} == {"192.0.2.1"}
    assert canary.calls == []


def test_one_of_many_addresses_is_enough_to_refuse(publishing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (one, 443)) for one in ("192.0.2.1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(InputError, match="not an address to call"):
        publishing("https://many.example/")


def test_an_import_follows_no_redirect(canary: Canary) -> None:
    """Of a server that an owner has named, to a place that they have not."""
    outside = Canary(location=f"http://127.0.0.1:{canary.port}/secret")
    source = RestSource(f"http://127.0.0.1:{outside.port}")
    try:
        with pytest.raises(MillraceError):
            list(source.experiments())
    finally:
        source.close()
        outside.close()
    assert outside.calls
    assert canary.calls == []


# --------------------------------------------------------------------------- databases

MARK = "zq7mark"
SQL = [
    "' OR '1'='1", "'; DROP TABLE runs; --", '" OR ""="', "1) UNION SELECT id, body FROM tokens --", "x' AND 1=CAST((SELECT 1) AS INT) --",
    "\\'; DELETE FROM events; --", "name`; --", "a%' ESCAPE '!' --", "$$; SELECT pg_sleep(9) --", "'||(SELECT body FROM tokens)||'",
    "created_at; DROP TABLE runs", "metrics.`x` DESC, (SELECT 1)", "?1", ":name", "/**/", "%s%(x)s{0}", "\u02bc OR 1=1 --", "x\x00' --",
]  # fmt: skip
FILTERS = [
    "{}", "metrics.`{}` > 0", 'params."{}" = \'1\'', "tags.`{}` LIKE '%{}%'", "attributes.run_name = '{}'", "attributes.{} = 'x'",
    "run_id IN ('{}')", "name ILIKE '{}'", "dataset.name = '{}'", "start_time > {}", "tags.x = \"{}\" AND params.y = '{}'",
]  # fmt: skip


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every statement, without the values that go beside it."""
    seen: list[str] = []

    def noting(name: str) -> Any:
        real = getattr(sqlite.sqlite3.Connection, name)

        def execute(self: Any, sql: str, *given: Any) -> Any:
            seen.append(sql)
            return real(self, sql, *given)

        return execute

    for name in ("execute", "executemany", "executescript"):
        monkeypatch.setattr(sqlite.SqliteConnection, name, noting(name))
    return seen


def searched(client: Client, text: str, run: str) -> list[Any]:
    """Everything that can be searched, filtered, sorted and named."""
    answers = []
    for one in FILTERS:
        wanted = one.replace("{}", text)
        for path, more in (("runs/search", {"experiment_ids": ["0", "1", "2", "3"]}), ("experiments/search", {}),
                           ("logged-models/search", {"experiment_ids": ["0"]})):  # fmt: skip
            answers.append(client.post(f"/api/2.0/mlflow/{path}", json={"filter": wanted, "max_results": 10, **more}))
        for path in ("registered-models/search", "model-versions/search"):
            answers.append(client.get(f"/api/2.0/mlflow/{path}", params={"filter": wanted}))
    for path in ("runs/search", "experiments/search"):
        body = {
            "experiment_ids": ["0"],
            "order_by": [text, f"metrics.`{text}` DESC", f"attributes.{text}"],
            "page_token": text,
        }
        answers.append(client.post(f"/api/2.0/mlflow/{path}", json=body))
        answers.append(client.post(f"/api/2.0/mlflow/{path}", json={"experiment_ids": [text], "run_view_type": text}))
    for query in ({"q": text}, {"sort": text}, {"column": f"metrics.{text}"}, {"project": text}, {"state": text}):
        answers.append(client.get("/runs", params=query))
    answers.append(client.get("/events", params={"subject": text, "before": text}))
    for path in (
        "runs",
        "events",
        "system/audit/events",
        "datasets",
        "models",
        "projects",
        "alerts",
        "tokens",
        "users",
    ):
        names = ("state", "actor", "verb", "subject", "text", "since", "order", "limit", "offset", "project", "where")
        for name in names:
            answers.append(client.get(f"/api/v1/{path}", params={name: text}))
    for name in ("metrics", "logs"):
        answers.append(client.get(f"/api/v1/runs/{run}/{name}", params={"name": text}))
    answers.append(
        client.post(f"/api/v1/runs/{run}/log", json={"run": run, "params": {text: text}, "tags": {text: text}})
    )
    answers.append(client.post("/api/v1/runs/track", json={"name": text, "project": text, "tags": {text: text}}))
    return answers


@pytest.mark.parametrize("payload", SQL)
def test_no_text_becomes_a_statement(site: Site, statements: list[str], payload: str) -> None:
    """Values travel beside statements: not a character of them is in one."""
    client, run = site.client(site.tokens["owner"]), site.ids["mine"]
    for answer in searched(client, f"{MARK}{payload}", run):
        assert answer.status_code < 500, (answer.request.url, answer.text)
        assert "Traceback" not in answer.text
    assert len(statements) > 50
    assert [sql for sql in statements if MARK in sql.lower()] == []
    tokens = site.client(site.tokens["owner"]).get("/api/v1/tokens").json()
    assert {"owner", "dev"} <= {token["name"] for token in tokens}, "all tables are there"


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.lists(
        st.sampled_from([*"'\"`;-()%_\\/*=<>,.?:$@| \n\t\x00\u2019", "OR ", " UNION ", "SELECT ", "--", "''"]),
        max_size=25,
    ).map("".join),
    form=st.sampled_from(FILTERS),
)
def test_any_filter_is_read_or_refused(site: Site, statements: list[str], text: str, form: str) -> None:
    client = site.client(site.tokens["owner"])
    wanted = form.replace("{}", MARK + text)
    answer = client.post("/api/2.0/mlflow/runs/search", json={"experiment_ids": ["0", "1"], "filter": wanted})
    assert answer.status_code in (200, 400), answer.text
    answer = client.get("/runs", params={"q": wanted, "sort": wanted})
    assert answer.status_code in (200, 400), answer.text
    assert [sql for sql in statements if MARK in sql.lower()] == []


def test_a_filter_that_is_always_true_shows_no_other_project(site: Site) -> None:
    client = site.client(site.tokens["dev"])
    for payload in SQL:
        for form in FILTERS:
            body = {"experiment_ids": ["0", "1", "2", "3"], "filter": form.replace("{}", payload)}
            assert "run-of-secret" not in client.post("/api/2.0/mlflow/runs/search", json=body).text, body
        assert "run-of-secret" not in client.get("/runs", params={"q": payload, "project": "secret"}).text
