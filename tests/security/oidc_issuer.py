"""An issuer of OpenID Connect on loopback, with real keys, that can be made to lie."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding
from joserfc import jwt
from joserfc.jwk import RSAKey

from millrace.core.clock import Clock, FakeClock
from millrace.security import oidc

NOW = 1_700_000_000.0
RSA = RSAKey.generate_key(2048)


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def by_hand(header: dict[str, Any], claims: Any, sign: Callable[[bytes], bytes]) -> str:
    body = f"{b64(json.dumps(header).encode())}.{b64(json.dumps(claims).encode())}"
    return f"{body}.{b64(sign(body.encode()))}"


def rs256(body: bytes, key: RSAKey = RSA) -> bytes:
    """A signature over any bytes, also over claims that the library would not write."""
    return key.private_key.sign(body, padding.PKCS1v15(), hashes.SHA256())  # type: ignore[union-attr]


class Issuer:
    """An issuer; what it says at a path can be replaced, and what it is asked is remembered."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock: Any = clock or FakeClock(NOW)
        self.published: list[dict[str, Any]] = [{**RSA.as_dict(private=False), "kid": "one"}]
        self.replaced: dict[str, tuple[int, dict[str, str], bytes]] = {}
        self.codes: dict[str, tuple[str, Any]] = {}
        self.asked: list[str] = []
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(dict(parse_qsl(self.rfile.read(int(self.headers["Content-Length"])).decode())))

            def answer(self, form: dict[str, str]) -> None:
                issuer.asked.append(self.path)
                status, headers, body = issuer.replaced.get(self.path) or issuer.says(self.path, form)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Nothing: the tests look at `asked`."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        self.metadata: dict[str, Any] = {
            "issuer": self.url, "authorization_endpoint": f"{self.url}/authorize", "token_endpoint": f"{self.url}/token",
            "jwks_uri": f"{self.url}/jwks",
        }  # fmt: skip
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def __enter__(self) -> Issuer:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def says(self, path: str, form: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if path == "/.well-known/openid-configuration":
            return 200, {}, json.dumps(self.metadata).encode()
        if path == "/jwks":
            return 200, {}, json.dumps({"keys": self.published}).encode()
        challenge, token = self.codes.pop(form.get("code", ""), ("", ""))
        found = base64.urlsafe_b64encode(hashlib.sha256(form.get("code_verifier", "").encode()).digest()).rstrip(b"=")
        if not token or found.decode() != challenge:
            return 400, {}, b'{"error": "invalid_grant"}'
        return 200, {}, json.dumps({"id_token": token, "access_token": "a", "token_type": "Bearer"}).encode()

    def claims(self, **changes: Any) -> dict[str, Any]:
        now = self.clock.now()
        whole = {"iss": self.url, "aud": "millrace", "sub": "s-1", "exp": now + 300, "iat": now, "nonce": "n",
                 "preferred_username": "ada", "email": "ada@example.org", "groups": ["staff"], **changes}  # fmt: skip
        return {name: value for name, value in whole.items() if value is not None}

    def token(self, key: Any = RSA, alg: str = "RS256", kid: str | None = "one", **changes: Any) -> str:
        header = {"alg": alg} if kid is None else {"alg": alg, "kid": kid}
        if alg == "RS256":
            return by_hand(header, self.claims(**changes), partial(rs256, key=key))  # the library refuses some
        return jwt.encode(header, self.claims(**changes), key, algorithms=[alg])

    def approve(self, place: str, token: str | None = None, **changes: Any) -> dict[str, str]:
        """What a browser that was sent to `place` comes back with, after somebody has signed in there."""
        query = {name: values[0] for name, values in parse_qs(urlsplit(place).query).items()}
        code = f"code-{len(self.asked)}-{len(self.codes)}"
        self.codes[code] = (query["code_challenge"], token or self.token(**{"nonce": query["nonce"], **changes}))
        return {"code": code, "state": query["state"]}

    def provider(self, **changes: Any) -> oidc.Provider:
        return oidc.Provider(oidc.Config(issuer=self.url, client_id="millrace", **changes), self.clock)
