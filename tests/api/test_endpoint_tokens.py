"""Deployed endpoints of a server that others can reach: over TLS, and for tokens that may call them alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trustme

from millrace.testing.graphs import write_scaler
from millrace.testing.namespaces import Hosts, can_make
from millrace.testing.server import RunningServer

pytestmark = [
    pytest.mark.root,
    pytest.mark.xdist_group("namespaces"),
    pytest.mark.skipif(not can_make(), reason="network namespaces need root and iproute2"),
]
ASK = """
import json, ssl, sys, urllib.error, urllib.request
url, ca, tokens = sys.argv[1], sys.argv[2], sys.argv[3:]
tensor = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}
body, context = json.dumps({"inputs": [tensor]}).encode(), ssl.create_default_context(cafile=ca)
for token in tokens:
    request = urllib.request.Request(url, body, {"Authorization": f"Bearer {token}"} if token != "-" else {})
    try:
        with urllib.request.urlopen(request, context=context, timeout=20) as answer:
            print(answer.status, json.load(answer)["outputs"][0]["data"])
    except urllib.error.HTTPError as error:
        print(error.code, json.load(error)["error"])
"""


def until(check: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_an_endpoint_elsewhere_answers_tokens_that_may_call_it(tmp_path: Path) -> None:
    authority, home = trustme.CA(), tmp_path / "home"
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    with Hosts(2) as hosts:
        authority.issue_cert(hosts.address(1)).private_key_and_cert_chain_pem.write_to_path(
            str(tmp_path / "server.pem")
        )
        arguments = ("--host", hosts.address(1), "--tls-cert", str(tmp_path / "server.pem"))
        server = RunningServer(home, prefix=hosts.prefix(1), environment={"MILLRACE_URL": ""}, arguments=arguments)

        def type_(*words: str) -> Any:
            """A command of the owner."""
            command = [*hosts.prefix(1), sys.executable, "-m", "millrace", *words, "--json"]
            owner = next(line.split()[1] for line in server.log.read_text().splitlines() if " owner " in line)
            found = {"MILLRACE_URL": server.url, "MILLRACE_CA_FILE": str(tmp_path / "ca.pem"), "MILLRACE_TOKEN": owner}
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=90,
                check=False,
                cwd=tmp_path,
                env={**os.environ, **found},
            )
            assert done.returncode == 0, done.stdout + done.stderr
            return json.loads(done.stdout)

        def ask(url: str, *tokens: str) -> list[str]:
            """What another host is answered."""
            command = [*hosts.prefix(2), sys.executable, "-c", ASK, url, str(tmp_path / "ca.pem"), *tokens]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            return done.stdout.splitlines()

        with server:
            type_("models", "register", str(write_scaler(tmp_path / "doubler.onnx")), "--name", "doubler")
            endpoint = type_("deploy", "doubler@1", "--endpoint", "doubler")
            assert endpoint["url"].startswith(f"https://{hosts.address(1)}:")
            url = f"{endpoint['url']}/v2/models/doubler/infer"
            tokens = {
                name: type_("tokens", "create", name, "--scope", scope)["secret"]
                for name, scope in {"shop": "caller:default", "other": "caller:other", "looks": "viewer"}.items()
            }
            until(lambda: ask(url, tokens["looks"])[0].startswith("403"), "the last of the tokens is believed")
            answers = ask(url, "-", "mr_wrong", tokens["looks"], tokens["other"], tokens["shop"])
            assert [answer.split()[0] for answer in answers] == ["401", "401", "403", "403", "200"], answers
            assert answers[-1] == "200 [2.0, 4.0]"
            assert ask(f"{endpoint['url']}/v2/health/live", "-") == ["405 want GET, got POST"], "health wants no token"
            type_("tokens", "revoke", "shop")
            until(lambda: ask(url, tokens["shop"])[0].startswith("401"), "it is believed no longer")
            search = ("system", "audit", "search", "--verb", "endpoint.predict")
            until(lambda: type_(*search), "denied attempts are events")
            found = type_(*search)
            assert {event["subject"] for event in found} == {"endpoint:doubler"}
            assert {event["detail"]["outcome"] for event in found} == {"auth.denied"}
            log = server.log.read_text()
            assert not any(secret in log for secret in tokens.values())
