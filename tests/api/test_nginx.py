"""nginx in front, with the configuration that the documentation shows: server, proxy and client are hosts of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import trustme

from millrace.testing.graphs import write_scaler
from millrace.testing.namespaces import Hosts, can_make
from millrace.testing.server import RunningServer

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/how-to/deployment.md"
NAME = "millrace.example.com"
pytestmark = [
    pytest.mark.root,
    pytest.mark.xdist_group("namespaces"),
    pytest.mark.skipif(not can_make(), reason="network namespaces need root and iproute2"),
    pytest.mark.skipif(shutil.which("nginx") is None, reason="there is no nginx here"),
]
# Resolves the name to the proxy, as a name server would, and prints the status of each request.
CLIENT = """
import socket, sys
find = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **more: find("10.77.0.2" if host == "millrace.example.com" else host, *rest, **more)
import httpx, re, ssl
base, token, password = "https://millrace.example.com", sys.argv[2], "blue tractor on mars"
with httpx.Client(base_url=base, verify=ssl.create_default_context(cafile=sys.argv[1])) as client:
    print("healthz", client.get("/healthz").status_code)
    print("no token", client.get("/api/v1/runs").status_code)
    print("token", client.get("/api/v1/runs", headers={"Authorization": "Bearer " + token}).status_code)
    upload = client.post("/api/v1/blobs", content=b"x" * 5_000_000, headers={"Authorization": "Bearer " + token})
    print("upload", upload.status_code)
    tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}
    for headers in ({}, {"Authorization": "Bearer " + token}):
        answer = client.post("/v2/models/doubler/infer", json={"inputs": [tensor]}, headers=headers)
        print("predict", answer.status_code)
    form = re.search(r'name="form" value="([^"]*)"', client.get("/login").text)[1]
    first = {"form": form, "name": "owner", "secret": token, "password": password, "again": password}
    answer = client.post("/login", data=first)
    print("sign in", answer.status_code, sorted(client.cookies.keys()))
    print("page", client.get("/runs").status_code)
    stolen = {"Origin": "https://evil.example"}
    print("foreign origin", client.post("/logout", headers=stolen).status_code)
"""
PLAIN = """
import http.client, sys
for port in sys.argv[1:]:
    try:
        link = http.client.HTTPConnection("10.77.0.1", int(port), timeout=10)
        link.request("GET", "/v2/health/live" if port == "7071" else "/healthz", headers={"X-Forwarded-Proto": "https"})
        print(port, link.getresponse().status)
    except ConnectionError:
        print(port, "is cut")
"""


def documented(folder: Path) -> Path:
    """A whole configuration around the documented server."""
    found = re.search(r"```nginx\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found
    server = found[1].replace("/etc/ssl/millrace.pem", f"{folder}/proxy.pem").replace(
        "/etc/ssl/millrace.key", f"{folder}/proxy.pem"
    )  # fmt: skip
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    path = folder / "nginx.conf"
    path.write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log stderr; user root; worker_processes 1;\n"
        f"events {{}}\nhttp {{ access_log off; {temporary}\n{server}\n}}\n"
    )
    return path


def typed(server: RunningServer, hosts: Hosts, folder: Path, token: str, *words: str) -> Any:
    """A command on the server's own host, straight to it."""
    command = [*hosts.prefix(1), sys.executable, "-m", "millrace", *words, "--json"]
    found = {"MILLRACE_URL": server.url, "MILLRACE_TOKEN": token}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=90, check=False, cwd=folder, env={**os.environ, **found}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def test_nginx_ends_tls_and_nobody_else_is_answered(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    authority.issue_cert(NAME).private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "proxy.pem"))
    with Hosts(3) as hosts:
        arguments = ("--host", hosts.address(1), "--serve-port", "7071", "--port", "7070", "--name", NAME,
                     "--tls-terminated-by-proxy", hosts.address(2))  # fmt: skip
        server = RunningServer(
            tmp_path / "home", prefix=hosts.prefix(1), environment={"MILLRACE_URL": ""}, arguments=arguments
        )
        command = [*hosts.prefix(2), "nginx", "-c", str(documented(tmp_path)), "-e", "stderr"]
        with server, (tmp_path / "nginx.log").open("w") as log:
            nginx = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                owner = next(line.split()[1] for line in server.log.read_text().splitlines() if " owner " in line)
                typed(server, hosts, tmp_path, owner, "models", "register", str(write_scaler(tmp_path / "doubler.onnx")),
                      "--name", "doubler")  # fmt: skip
                typed(server, hosts, tmp_path, owner, "deploy", "doubler@1", "--endpoint", "doubler")
                lasting = typed(server, hosts, tmp_path, owner, "tokens", "create", "lasting", "--scope", "owner")[
                    "secret"
                ]
                wait = [
                    *hosts.prefix(2),
                    sys.executable,
                    "-c",
                    "import socket; socket.create_connection(('10.77.0.2', 443))",
                ]
                deadline = time.monotonic() + 30
                while subprocess.run(wait, capture_output=True, check=False).returncode:
                    assert time.monotonic() < deadline, (tmp_path / "nginx.log").read_text()
                client = [*hosts.prefix(3), sys.executable, "-c", CLIENT, str(tmp_path / "ca.pem"), owner]
                done = subprocess.run(client, capture_output=True, text=True, timeout=90, check=False)
                assert done.stdout.splitlines() == [
                    "healthz 200", "no token 401", "token 200", "upload 200", "predict 401", "predict 200",
                    "sign in 303 ['__Host-millrace', '__Host-millrace-form']", "page 200",
                    "foreign origin 403",
                ], done.stdout + done.stderr + (tmp_path / "nginx.log").read_text()  # fmt: skip
                straight = [*hosts.prefix(3), sys.executable, "-c", PLAIN, "7070", "7071"]
                done = subprocess.run(straight, capture_output=True, text=True, timeout=60, check=True)
                assert done.stdout.splitlines() == ["7070 403", "7071 is cut"], done.stdout
                (event,) = typed(
                    server, hosts, tmp_path, lasting, "system", "audit", "search", "--verb", "session.create"
                )
                assert event["detail"]["address"] == "10.77.0.3"
            finally:
                nginx.terminate()
                nginx.wait(10)
