"""Who may call which model: every route of the data plane, with every kind of token that is not good enough."""

from __future__ import annotations

import http.client
import json
import queue
import socket
import ssl
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trustme

from millrace.control.authorisation import acting_as, authenticate
from millrace.control.callers import Callers, living_callers
from millrace.control.dispatch import Dispatcher
from millrace.core.errors import DeniedError, InputError, MillraceError, NotFoundError
from millrace.core.operations.live import PREDICT
from millrace.core.principals import ROLES, includes, new_secret, token_id
from millrace.core.types import Endpoint, Token, User
from millrace.formats.bundle import open_bundle
from millrace.serve import access
from millrace.serve.access import OPEN, Caller, Denied, Guard
from millrace.serve.admission import Admission
from millrace.serve.catalog import Catalog
from millrace.serve.dataplane import DataPlane, ModelInfo
from millrace.serve.hosting import HostConfig, HostedModel, HostProcess, ModelState
from millrace.serve.revisions import Directory
from millrace.serve.routes import Routes
from millrace.serve.runtimes.onnx import OnnxRuntime
from millrace.wiring import open_dispatcher

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # gevent and geventhttpclient warn at import
    import tritonclient.http as triton

ROW = {"instances": [[1.0] * 64]}
PREDICT_ONE = "/v1/models/one:predict"
GOOD = ("caller", "developer", "operator", "maintainer", "owner", "user", "group", "custom")
BAD = {
    "none": 401, "unknown": 401, "basic": 401, "empty": 401, "expired": 401, "revoked": 401, "disabled": 401,
    "work": 401, "viewer": 403, "annotator": 403, "worker": 403, "denied": 403, "narrow": 403, "nobody": 403,
}  # fmt: skip


class Site:
    """A home with tokens of every kind, and a host that serves `one` of project `p` and `two` of project `q`."""

    def __init__(self, home: Dispatcher, bundle: Path, **place: Any) -> None:
        self.home = home
        self.states: queue.Queue[ModelState] = queue.Queue()
        self.denied: queue.Queue[Denied] = queue.Queue()
        self.tokens = {"unknown": new_secret(), "none": ""}
        self._fill()
        self.process = HostProcess(
            HostConfig(wants_token=True, **place), lambda *_: None, self.states.put, self.denied.put
        )
        self.port = self.process.wait_ready()
        digest = open_bundle(bundle, signature=None, verifier=None, expected_digest=None).digest
        self.models = [
            HostedModel(
                endpoint=name, project=project, bundle_dir=str(bundle), digest=digest,
                version="1", variant="fp32",
            )
            for name, project in (("one", "p"), ("two", "q"))
        ]  # fmt: skip

    def serve(self) -> Site:
        self.process.apply(self.models)
        assert [self.states.get(timeout=30).error for _ in self.models] == [None, None]
        Callers(self.home.services).tell([self.process])
        deadline = time.monotonic() + 10
        while self.call("GET", "/v2", "owner")[0] != 200:
            assert time.monotonic() < deadline, "it is told of tokens"
            time.sleep(0.02)
        return self

    def _fill(self) -> None:
        call = self.home.call
        for user, grants in {"ada": ["operator:p"], "eve": ["developer:p"], "max": ["owner"], "bob": []}.items():
            call("user.create", {"name": user, "service": True})
            for grant in grants:
                role, _, project = grant.partition(":")
                call("role.grant", {"who": user, "role": role, **({"project": project} if project else {})})
        call("role.create", {"name": "asks", "allow": "endpoint.predict"})
        call("role.create", {"name": "stopped", "deny": "endpoint.predict"})
        call("role.grant", {"who": "eve", "role": "stopped", "project": "p"})
        for name in ("caller", "developer", "operator", "maintainer"):
            self.add(name, f"{name}:p")
        for name in ("viewer", "annotator", "worker", "owner"):
            self.add(name, name)
        self.add("custom", "asks:p")
        self.add("other", "caller:q")
        self.add("user", user_name="ada")
        self.add("denied", user_name="eve")
        self.add("narrow", "viewer", user_name="max")
        self.add("nobody", user_name="bob")
        self.add("expired", "owner", expires_at=1.0)
        self.add("revoked", "owner", revoked_at=1.0)
        self.add("work", "work", work_id="w1")
        call("user.create", {"name": "gone", "service": True})
        call("role.grant", {"who": "gone", "role": "owner"})
        self.add("disabled", user_name="gone")
        call("user.disable", {"name": "gone"})
        self.home.services.records.put(User(id="lee", name="lee", groups=("askers",), external="https://id|1"))
        call("role.grant", {"who": "group:askers", "role": "asks", "project": "p"})
        self.add("group", user_name="lee")

    def add(self, name: str, *scopes: str, **changes: Any) -> str:
        secret = self.tokens[name] = new_secret()
        self.home.services.records.put(
            Token(id=token_id(secret), name=name, prefix=secret[:9], scopes=scopes, **changes)
        )
        return secret

    def headers(self, kind: str) -> dict[str, str]:
        if kind == "basic":
            return {"Authorization": f"Basic {self.tokens['owner']}"}
        if kind == "empty":
            return {"Authorization": "Bearer "}
        return {"Authorization": f"Bearer {self.tokens[kind]}"} if self.tokens[kind] else {}

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def call(self, method: str, path: str, kind: str, body: Any = None) -> tuple[int, Any]:
        connection = self.connect()
        try:
            connection.request(method, path, None if body is None else json.dumps(body), self.headers(kind))
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, json.loads(data) if is_json else data.decode()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dispatcher]:
    opened = open_dispatcher(str(tmp_path_factory.mktemp("access") / "home"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def site(home: Dispatcher, digits_bundle: Path) -> Iterator[Site]:
    made = Site(home, digits_bundle)
    yield made.serve()
    assert made.process.stop() == 0


@pytest.fixture(scope="module")
def routes(digits_bundle: Path) -> list[tuple[str, str]]:
    """Method and path of everything that is mounted: read from the tables, with `one` as the model."""
    runtime = OnnxRuntime(digits_bundle)
    runtime.load()
    plane = DataPlane(
        ModelInfo(name="one", version="1"),
        runtime,
        runtime.bundle.signature,
        Admission(),
        _NoBatcher(),  # type: ignore[arg-type]
    )
    of_model, shared = Routes(plane, 1), Catalog(Directory(), "1", 1)
    found = {(method.decode(), path.decode()) for path, (method, _) in shared._routes.items()}
    for verb, (method, _) in of_model.v2.items():
        for place in ("/v2/models/one", "/v2/models/one/versions/1", "/v2/models/o%6ee"):
            found.add((method.decode(), f"{place}/{verb.decode()}".rstrip("/")))
    for verb, (method, _) in of_model.v1.items():
        found.add((method.decode(), f"/v1/models/one:{verb.decode()}".rstrip(":")))
    found |= {
        ("GET", "/v2/models/one/"),
        ("GET", "/nothing"),
        ("POST", "/v1/models/no:predict"),
    }
    assert len(found) > 25
    return sorted(found)


class _NoBatcher:
    """Where nothing runs."""


@pytest.mark.parametrize("kind", BAD)
def test_no_route_is_answered_without_a_token_that_may_call(
    site: Site, routes: list[tuple[str, str]], kind: str
) -> None:
    for method, path in routes:
        status, answer = site.call(method, path, kind, ROW if method == "POST" else None)
        if path.encode() in OPEN:
            assert (status, "error" in answer) == (200, False), path
        else:
            assert status == BAD[kind], (path, answer)
            assert list(answer) == ["error"], path
            assert site.tokens.get(kind) in (None, "") or site.tokens[kind] not in answer["error"]


@pytest.mark.parametrize("kind", GOOD)
def test_every_route_is_answered_for_who_may_call(site: Site, routes: list[tuple[str, str]], kind: str) -> None:
    for method, path in routes:
        status, answer = site.call(method, path, kind, ROW if method == "POST" else None)
        wanted = {"/nothing": {404}, "/v1/models/no:predict": {404} if kind == "owner" else {403}}
        assert status in wanted.get(path, {200, 400}), (path, status, answer)
    assert site.call("POST", PREDICT_ONE, kind, ROW)[0] == 200


def test_other_projects_models_are_shown_to_nobody(site: Site) -> None:
    status, hidden = site.call("POST", PREDICT_ONE, "other", ROW)
    assert status == 403
    assert "it may: two" in hidden["error"]
    missing = site.call("POST", "/v1/models/none:predict", "other", ROW)
    assert (missing[0], missing[1]["error"]) == (403, hidden["error"].replace("'one'", "'none'")), "as if it were none"
    assert site.call("POST", "/v1/models/two:predict", "other", ROW)[0] == 200
    assert site.call("GET", "/v1/models", "other")[1] == {"models": ["two"]}
    assert site.call("GET", "/v1/models", "owner")[1] == {"models": ["one", "two"]}
    assert [one["name"] for one in site.call("POST", "/v2/repository/index", "caller")[1]] == ["one"]
    assert [one["name"] for one in site.call("GET", "/v2/models/stats", "caller")[1]["model_stats"]] == ["one"]
    metrics = site.call("GET", "/metrics", "other")[1]
    assert 'model="two"' in metrics
    assert 'model="one"' not in metrics


def test_the_api_says_where_to_call_to_whoever_may(site: Site) -> None:
    services = site.home.services
    services.records.put(
        Endpoint(
            id="one", project="p", name="one", model="m", number=1, variant="", state="ready", url="https://h:1",
            is_managed=True,
        )
    )  # fmt: skip
    for kind, error in {"caller": None, "user": None, "viewer": DeniedError, "other": NotFoundError}.items():
        with acting_as(authenticate(services, site.tokens[kind])):
            if error is None:
                told = site.home.call("endpoint.predict", {"name": "one"})
                assert (told.predict, told.wants_token) == ("https://h:1/v1/models/one:predict", True)
            else:
                with pytest.raises(error):
                    site.home.call("endpoint.predict", {"name": "one"})


def test_the_loop_tells_what_the_api_would_decide(site: Site) -> None:
    """One rule: what a token may call is what `authenticate` and its principal say."""
    told = {one.digest: one for one in living_callers(site.home.services)}
    for name, secret in site.tokens.items():
        digest = token_id(secret)
        try:
            principal = authenticate(site.home.services, secret)
        except MillraceError:
            assert digest not in told, name
            continue
        if principal.work_id is not None:
            assert digest not in told, name
            continue
        where = principal.where(PREDICT.name, PREDICT.is_write)
        assert (frozenset(told[digest].where), told[digest].who) == (where, principal.id)
    assert {role for role in ROLES if role in site.tokens} >= {"viewer", "caller", "owner"}


def test_a_request_is_denied_before_its_body_is_sent(site: Site) -> None:
    head = "POST /v1/models/one:predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 60000000\r\n"
    for more in ("", "Expect: 100-continue\r\n", f"Authorization: Bearer {site.tokens['viewer']}\r\n"):
        with socket.create_connection(("127.0.0.1", site.port), timeout=20) as client:
            client.sendall(f"{head}{more}\r\n".encode())
            answer = client.makefile("rb").read()
        assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 403")), answer
        assert (b"WWW-Authenticate: Bearer" in answer) == answer.startswith(b"HTTP/1.1 401")
        assert b"Connection: close" in answer


def test_two_tokens_are_none(site: Site) -> None:
    line = f"Authorization: Bearer {site.tokens['owner']}\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=20) as client:
        client.sendall(f"GET /v2 HTTP/1.1\r\nHost: localhost\r\n{line}{line}\r\n".encode())
        assert client.recv(100).startswith(b"HTTP/1.1 400")


TENSOR = {"name": "pixels", "shape": [1, 64], "datatype": "FP32", "data": [1.0] * 64}


@pytest.mark.parametrize(
    ("name", "path", "body"), [("rows", PREDICT_ONE, ROW), ("tensors", "/v2/models/one/infer", {"inputs": [TENSOR]})]
)
def test_a_revoked_token_is_refused_on_a_connection_that_it_has_opened(
    site: Site, name: str, path: str, body: Any
) -> None:
    secret = site.add(name, "caller:p")
    site.process.believe(living_callers(site.home.services))
    payload = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {secret}\r\n"
    request = f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload

    def ask(client: socket.socket) -> int:
        client.sendall(request)  # at once: the second time its head is known, and is not parsed again
        return int(client.recv(1 << 16).split(maxsplit=2)[1])

    deadline = time.monotonic() + 10
    while True:
        with socket.create_connection(("127.0.0.1", site.port), timeout=20) as client:
            if ask(client) == 200:
                assert [ask(client) for _ in range(5)] == [200] * 5
                site.home.call("token.revoke", {"name": name})
                site.process.believe(living_callers(site.home.services))
                while (status := ask(client)) == 200:
                    assert time.monotonic() < deadline
                assert status == 401
                return
        assert time.monotonic() < deadline, "the token is believed"


def test_denied_attempts_are_counted_and_told_without_secrets(site: Site) -> None:
    site.call("POST", PREDICT_ONE, "viewer", ROW)
    lines = site.call("GET", "/metrics", "caller")[1].splitlines()
    counted = next(line for line in lines if line.startswith('millrace_denied_total{model="one"'))
    assert float(counted.rpartition(" ")[2]) >= 1
    seen: list[Denied] = []
    deadline = time.monotonic() + 10
    while "one" not in {one.endpoint for one in seen}:
        assert time.monotonic() < deadline
        seen.append(site.denied.get(timeout=10))
    assert not any(secret and secret in repr(seen) for secret in site.tokens.values())
    callers = Callers(site.home.services)
    callers.record(Denied(endpoint="one", statuses={"403": 2}, who=["token:viewer"]))
    site.home.services.records.seal()
    event = site.home.services.records.events(0, limit=10_000)[-1]
    assert (event.verb, event.subject) == ("endpoint.predict", "endpoint:one")
    assert event.detail == {"outcome": "auth.denied", "statuses": {"403": 2}, "who": ["token:viewer"]}


# --------------------------------------------------------------------------- the guard alone


def guard_of(**changes: Any) -> tuple[Guard, dict[bytes, bytes]]:
    guard = Guard()
    guard.serve({"one": "p"})
    caller = Caller(digest=token_id("mr_x"), who="token:x", where=("p",))
    guard.believe([msgspec.structs.replace(caller, **changes)])
    return guard, {b"authorization": b"Bearer mr_x"}


def status_of(guard: Guard, headers: dict[bytes, bytes], target: bytes = PREDICT_ONE.encode()) -> int:
    denial = guard.check(target, headers)
    return 200 if denial is None else denial.status


def test_nobody_is_believed_before_the_guard_is_told() -> None:
    assert status_of(Guard(), {b"authorization": b"Bearer mr_x"}) == 503


def test_a_token_expires_by_itself() -> None:
    guard, headers = guard_of(expires_at=time.time() + 0.2)
    assert [status_of(guard, headers), status_of(guard, headers)] == [200, 200]
    time.sleep(0.25)
    assert status_of(guard, headers) == 401


def test_without_news_nobody_is_believed_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "BELIEVED_S", 0.2)
    guard, headers = guard_of()
    assert [status_of(guard, headers), status_of(guard, headers)] == [200, 200]
    time.sleep(0.25)
    assert status_of(guard, headers) == 503


def test_deny_wins_in_its_project() -> None:
    guard, headers = guard_of(where=("*", "!p"))
    assert status_of(guard, headers) == 403
    assert includes(frozenset({"*", "!p"}), "q")


def test_what_passes_is_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "_MAX_KNOWN", 10)
    guard, headers = guard_of()
    for number in range(100):
        assert status_of(guard, headers, b"/v2/models/one?%d" % number) == 200
        assert status_of(guard, {b"authorization": b"Bearer mr_%d" % number}) == 401
    assert len(guard._passes) <= 10


def test_denials_are_told_once_a_minute_and_within_bounds() -> None:
    guard, _ = guard_of()
    for number in range(1000):
        status_of(guard, {}, b"/v2/models/m%d" % number)
        status_of(guard, {})
    first = {one.endpoint: one.statuses for one in guard.take_denied(0.0)}
    assert first == {"*": {"401": 1000}, "one": {"401": 1000}}
    status_of(guard, {})
    assert guard.take_denied(30.0) == []
    assert [one.statuses for one in guard.take_denied(61.0)] == [{"401": 1}]


# --------------------------------------------------------------------------- TLS


@pytest.mark.parametrize("place", [{}, {"wants_token": True}, {"tls_cert": "given"}])
def test_others_reach_only_a_guarded_host_with_a_certificate(place: dict[str, Any], tmp_path: Path) -> None:
    if "tls_cert" in place:
        trustme.CA().issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "c.pem"))
        place = {"tls_cert": str(tmp_path / "c.pem")}
    process = HostProcess(HostConfig(host="0.0.0.0", **place), lambda *_: None, lambda *_: None)
    with pytest.raises(InputError, match="loopback"):
        process.wait_ready()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_over_tls(tmp_path: Path, digits_bundle: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "cert.pem"))
    home = open_dispatcher(str(tmp_path / "home"))
    site = Site(home, digits_bundle, tls_cert=str(tmp_path / "cert.pem"))
    context = ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    site.connect = lambda: http.client.HTTPSConnection("localhost", site.port, timeout=20, context=context)  # type: ignore[method-assign]
    site.serve()
    try:
        assert site.call("POST", PREDICT_ONE, "caller", ROW)[0] == 200
        large = {"instances": ROW["instances"] * 20_000}  # sent into a connection that refuses it
        assert site.call("POST", PREDICT_ONE, "viewer", large)[0] == 403
        client = triton.InferenceServerClient(
            f"localhost:{site.port}", ssl=True, ssl_options={"ca_certs": str(tmp_path / "ca.pem")}
        )
        pixels = triton.InferInput("pixels", [2, 64], "FP32")
        pixels.set_data_from_numpy(np.zeros((2, 64), dtype=np.float32))
        answer = client.infer("one", [pixels], headers=site.headers("caller"))
        probabilities = answer.as_numpy("probabilities")
        assert probabilities is not None
        assert probabilities.shape == (2, 10)
        client.close()
    finally:
        assert site.process.stop() == 0
        home.close()
