"""Attacks that must be refused, over every mounted route: they are enumerated from the router, not listed.

Where each comes from: MLflow's authorisation stood beside its route table and was passed by again and again
(CVE-2023-1177, CVE-2023-6831, CVE-2024-1560, CVE-2025-11200, CVE-2026-0545, CVE-2026-2614); Ray's jobs ran
anybody's code (CVE-2023-48022); the OWASP API Security Top 10 of 2023 (API1 object level, API2 authentication,
API3 property level, API5 function level authorisation); CWE-22 for paths, CWE-502 for pickles, CWE-1236 for formulas.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from attacked import OPEN, Site, filled

from millrace.core.principals import Grant, Principal, new_secret


def test_mlflow_clients_hear_what_they_lack(site: Site) -> None:
    refused = site.client().get("/api/2.0/mlflow/experiments/search", headers={"Accept": "*/*"})
    assert (refused.status_code, refused.json()["error_code"]) == (401, "UNAUTHENTICATED")
    assert "MLFLOW_TRACKING_TOKEN" in refused.json()["message"]
    assert refused.headers["WWW-Authenticate"].startswith("Bearer")


@pytest.mark.parametrize("kind", ["none", "unknown", "expired", "revoked", "basic", "two", "empty", "lower"])
def test_no_route_answers_without_a_valid_token(site: Site, kind: str) -> None:
    bad = {
        "none": {}, "unknown": {"Authorization": f"Bearer {new_secret()}"}, "basic": {"Authorization": "Basic bXI6bXI="},
        "expired": {"Authorization": f"Bearer {site._token('old', 'owner', expires_at=1.0)}"},
        "revoked": {"Authorization": f"Bearer {site._token('gone', 'owner', revoked_at=1.0)}"},
        "two": [("Authorization", f"Bearer {site.tokens['owner']}")] * 2,
        "empty": {"Authorization": "Bearer "}, "lower": {"Authorization": site.tokens["owner"]},
    }[kind]  # fmt: skip
    client = site.client()
    answered = {
        (method, path): answer.status_code
        for method, path in site.routes()
        if path not in OPEN and not path.startswith("/static")
        and (answer := client.request(method, filled(path, "x"), headers=bad, follow_redirects=False)).status_code
        not in (401, 303, 302)
    }  # fmt: skip
    assert answered == {}


def test_no_route_shows_or_changes_what_belongs_to_another_project(site: Site) -> None:
    """Every route with every id of the other project, by path and by body, as developer, maintainer and viewer."""
    other = site.ids["secret"]
    view = site.home.call("run.get", {"run": other})
    digest = view.steps[0].outputs["notes"].digest
    before = len(site.home.services.records.events(0, limit=10_000))
    body = {
        "run": other, "run_id": other, "run_ids": [other], "left": other, "right": other, "project": "secret",
        "experiment_id": "2", "experiment_ids": ["2"], "key": "k", "value": "v", "name": "x", "digest": digest,
        "state": "failed", "status": "FAILED", "run_uuid": other, "metric_key": "loss", "alias": "champion",
        "tags": [{"key": "a", "value": "b"}], "entries": [{"path": "x", "digest": digest, "size_bytes": 13}],
    }  # fmt: skip
    for who in ("dev", "main", "look"):
        client = site.client(site.tokens[who])
        for method, path in site.routes():
            for value in (other, digest, "secret", f"2/{other}/artifacts/notes"):
                url = filled(path, value)
                sent = (
                    {"params": {k: v for k, v in body.items() if isinstance(v, str)}}
                    if method in ("GET", "HEAD", "DELETE")
                    else {"json": body}
                )
                if "/stream" in path:
                    continue
                answer = client.request(method, url, follow_redirects=False, **sent)
                assert "canary-secret" not in answer.text, (who, method, url)
                assert "run-of-secret" not in answer.text, (who, method, url)
                assert answer.status_code < 500 or answer.status_code == 501, (who, method, url, answer.text)
    after = site.home.call("run.get", {"run": other})
    assert (after.run, after.values) == (view.run, view.values), "nothing of it has changed"
    done = site.home.services.records.events(0, limit=10_000)[before:]
    assert not [event for event in done if other in event.subject and event.detail.get("outcome") == "ok"]


def test_nobody_raises_themselves(site: Site) -> None:
    for who in ("dev", "main", "look", "worker"):
        client = site.client(site.tokens[who])
        for path, body in {
            "/api/v1/tokens": {"name": f"more-{who}", "scope": "owner"},
            "/api/v1/tokens/owner/revoke": {},
            "/api/v1/quotas": {"in_project": "mine", "runs": 1000},
            "/api/v1/approval-rules/delete": {"in_project": "mine"},
        }.items():
            assert client.post(path, json=body).status_code in (403, 404), (who, path)
    assert site.client(site.tokens["owner"]).get("/api/v1/tokens").status_code == 200


def test_no_file_is_put_into_the_run_of_another_project(site: Site) -> None:
    """Also by who works in the project where things go that name none."""
    root = f"/api/2.0/mlflow-artifacts/artifacts/2/{site.ids['secret']}/artifacts"
    for who in ("plain", "dev", "main", "look"):
        answer = site.client(site.tokens[who]).request("PUT", f"{root}/planted.txt", content=b"planted")
        assert answer.status_code in (403, 404), (who, answer.text)
    shown = site.client(site.tokens["owner"]).get(
        "/api/2.0/mlflow/artifacts/list", params={"run_id": site.ids["secret"]}
    )
    assert shown.status_code == 200
    assert "planted" not in shown.text


def test_nothing_is_received_of_who_may_not_send(site: Site) -> None:
    """Neither kept as a blob nor as a temporary file; and who may send to one project sends in parts too."""
    stored = {one.digest for one in site.home.services.blobs.list()}
    run = site.ids["mine"]
    client = site.client(site.tokens["look"])
    for method, url in (("POST", "/api/v1/blobs"), ("PUT", f"/api/2.0/mlflow-artifacts/artifacts/3/{run}/artifacts/a.txt"),
                        ("PUT", f"/api/2.0/mlflow-artifacts/mpu/part/{'0' * 48}/1")):  # fmt: skip
        assert client.request(method, url, content=b"unwanted").status_code == 403, url
    assert {one.digest for one in site.home.services.blobs.list()} == stored
    client = site.client(site.tokens["dev"])
    folder = f"3/{run}/artifacts"
    made = client.post(
        f"/api/2.0/mlflow-artifacts/mpu/create/{folder}", json={"path": "big.bin", "num_parts": 1}
    ).json()
    part = made["credentials"][0]
    sent = client.request("PUT", part["url"], content=b"in parts")
    assert sent.status_code == 200, sent.text
    parts = [{"part_number": 1, "etag": sent.headers["ETag"], "url": part["url"]}]
    done = client.post(f"/api/2.0/mlflow-artifacts/mpu/complete/{folder}",
                       json={"path": "big.bin", "upload_id": made["upload_id"], "parts": parts})  # fmt: skip
    assert done.status_code == 200, done.text
    assert client.get(f"/api/2.0/mlflow-artifacts/artifacts/{folder}/big.bin").content == b"in parts"


@pytest.mark.parametrize(
    "path",
    ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "%252e%252e%252fetc%252fpasswd",
     "/etc/passwd", "//etc/passwd", "..\\..\\etc\\passwd", "notes%00.txt", "....//etc/passwd", "file:///etc/passwd"],
)  # fmt: skip
def test_no_path_leads_out(site: Site, path: str) -> None:
    client = site.client(site.tokens["owner"])
    run, before = site.ids["mine"], Path("/etc/passwd").stat()
    root = f"/api/2.0/mlflow-artifacts/artifacts/1/{run}/artifacts"
    for method, url in (("GET", f"{root}/{path}"), ("DELETE", f"{root}/{path}"), ("PUT", f"{root}/{path}"),
                        ("GET", f"/runs/{run}/files/{path}"), ("GET", f"/static/{path}"),
                        ("GET", f"/api/2.0/mlflow-artifacts/artifacts?path=1/{run}/artifacts/{path}"),
                        ("GET", f"/get-artifact?run_uuid={run}&path={path}"), ("GET", f"/api/v1/blobs/{path}")):  # fmt: skip
        content = b"written" if method == "PUT" else None
        answer = client.request(method, url, content=content, follow_redirects=False)
        assert "root:" not in answer.text, (method, url)
        assert answer.status_code < 500, (method, url, answer.text)
    assert Path("/etc/passwd").stat() == before
    assert not any(site.home.services.home.parent.rglob("passwd*"))


def test_error_bodies_leak_no_path_query_or_stack(site: Site) -> None:
    client = site.client(site.tokens["main"])
    home = str(site.home.services.home)
    for method, path in site.routes():
        if "/stream" in path:
            continue
        answer = client.request(method, filled(path, "'nothing\"<x>"), content=b"{", follow_redirects=False)
        if answer.status_code >= 400:
            for leak in (home, "Traceback", "SELECT ", "sqlite3", "psycopg", "site-packages"):
                assert leak not in answer.text, (method, path, leak)


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a":' * 50_000, b"NaN", b"[NaN]", b'"x"', b"\xff\xfe", b"{" + b" " * 40_000_000]
)
def test_json_that_is_none(site: Site, data: bytes) -> None:
    client = site.client(site.tokens["owner"])
    for path in ("/api/v1/tokens", "/api/2.0/mlflow/runs/create", "/api/2.0/mlflow/runs/search"):
        answer = client.post(path, content=data, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, (path, answer.text[:200])


def test_headers_of_a_proxy_prove_nothing(site: Site) -> None:
    """What proxies send is no proof here."""
    for name in ("X-Forwarded-User", "X-Remote-User", "Remote-User", "X-Millrace-User", "Cookie"):
        assert site.client().get("/api/v1/runs", headers={name: "owner"}).status_code == 401
    assert Principal(id="user:x", grants=(Grant(role="viewer"),)).where("token.create", True) == frozenset()
