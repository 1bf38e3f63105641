"""OpenID Connect, the relying party: code flow with PKCE, state and nonce; tokens verified by the issuer's keys.

Follows OpenID Connect Core 1.0 (3.1.3.7: validation), RFC 7636 (PKCE), RFC 9207 (`iss` in the answer), RFC 8725
(JWT best practice: algorithms are chosen here, never by the token).
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
import secrets
import ssl
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any
from urllib.parse import quote_plus, urlencode, urlsplit

import httpx
import msgspec
from joserfc import jwk, jwt
from joserfc.errors import JoseError

from millrace.core.addresses import is_loopback
from millrace.core.clock import Clock
from millrace.core.errors import UnauthenticatedError, UnavailableError
from millrace.core.types import Struct

ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
KEY_TYPES = ("RSA", "EC")  # never a shared secret: what is public could sign then
NOT_PUBLIC = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "key_ops"})
SCOPE = "openid profile email"
LEEWAY_S = 60
MOST_AGE_S = 600  # of a token that was made just now, for us
KEYS_AT_MOST_EVERY_S = 60.0  # an unknown key asks for the keys again, but not for every forged token
METADATA_S = 3600.0  # what is withdrawn there is gone here after so long
AGAIN_S = 5.0  # after a failure nobody waits for the issuer
TIMEOUT_S = 10.0
MAX_BYTES = 1 << 20
MOST_GROUPS, MAX_NAME = 200, 200
PLAIN = {"Accept": "application/json", "Accept-Encoding": "identity"}  # nothing that is large once it is unpacked


class Config(Struct, frozen=True, kw_only=True):
    """The issuer, and what this server is called there. Without a secret PKCE alone proves who redeems a code."""

    issuer: str
    client_id: str
    client_secret: str = ""
    groups_claim: str = "groups"


class Identity(Struct, frozen=True, kw_only=True):
    """Somebody, as the issuer knows them. `subject` is theirs for good; names and groups may change."""

    subject: str
    name: str
    email: str
    groups: tuple[str, ...]


class Provider:
    """An issuer. Thread-safe.

    Args:
        config: Which, and who we are.
        clock: Where the time comes from.

    Raises:
        UnauthenticatedError: The issuer is no https URL.
    """

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config, self._clock, self._lock = config, clock, threading.Lock()
        self._metadata: dict[str, Any] = {}
        self._metadata_at = 0.0
        self._failed_at = -math.inf
        self._keys: dict[str, Any] = {}
        self._keys_at, self._reading = -math.inf, threading.Lock()
        self._check_url(config.issuer)

    def begin(self, redirect_uri: str) -> tuple[str, dict[str, str]]:
        """Where to send the browser, and what has to be remembered until it comes back.

        Args:
            redirect_uri: Where it comes back to.

        Raises:
            UnavailableError: The issuer does not answer.
            UnauthenticatedError: What it says of itself is wrong.
        """
        pending = {name: secrets.token_urlsafe(32) for name in ("state", "nonce", "verifier")}
        challenge = base64.urlsafe_b64encode(hashlib.sha256(pending["verifier"].encode()).digest()).rstrip(b"=")
        metadata, groups = self.metadata(), self._config.groups_claim
        listed = metadata.get("scopes_supported")  # some tell groups to who asks for them alone
        scope = f"{SCOPE} {groups}" if isinstance(listed, list) and groups in listed else SCOPE
        query = {
            "response_type": "code", "client_id": self._config.client_id, "redirect_uri": redirect_uri, "scope": scope,
            "state": pending["state"], "nonce": pending["nonce"], "code_challenge": challenge.decode(),
            "code_challenge_method": "S256",
        }  # fmt: skip
        endpoint = metadata["authorization_endpoint"]
        return f"{endpoint}{'&' if '?' in endpoint else '?'}{urlencode(query)}", pending

    def finish(self, pending: Mapping[str, str], answer: Mapping[str, str], redirect_uri: str) -> Identity:
        """Redeem the code that the browser has brought back.

        Args:
            pending: What `begin` has returned.
            answer: The query of the URL that the browser came back to.
            redirect_uri: The same as before.

        Raises:
            UnavailableError: The issuer does not answer.
            UnauthenticatedError: Something is missing, wrong, old or not signed by the issuer.
        """
        if not _is_same(answer.get("state", ""), pending.get("state", "")):
            raise UnauthenticatedError("the state is missing or another one: this sign-in did not begin here")
        always = self.metadata().get("authorization_response_iss_parameter_supported") is True
        if answer.get("iss", "" if always else self._config.issuer) != self._config.issuer:
            raise UnauthenticatedError("the answer comes from another issuer")
        if not answer.get("code"):
            raise UnauthenticatedError(f"the issuer gave no code: {answer.get('error', 'no reason')[:100]!r}")
        tokens = self._redeem(answer["code"], pending.get("verifier", ""), redirect_uri)
        id_token = tokens.get("id_token")
        if not isinstance(id_token, str):
            raise UnauthenticatedError("the issuer gave no ID token")
        claims = self.verify(id_token, pending.get("nonce", ""))
        return self._identity(claims, tokens.get("access_token"))

    def metadata(self) -> dict[str, Any]:
        """What the issuer says of itself, read again every hour.

        Raises:
            UnavailableError: It does not answer.
            UnauthenticatedError: It answers with a redirect, in another's name, or names places that are not https.
        """
        with self._lock:
            if self._metadata and self._clock.now() - self._metadata_at < METADATA_S:
                return self._metadata
            if self._clock.now() - self._failed_at < AGAIN_S:
                raise UnavailableError(f"{urlsplit(self._config.issuer).hostname} did not answer just now")
            try:
                found = _get(self._config.issuer.rstrip("/") + "/.well-known/openid-configuration")
            except UnavailableError:
                self._failed_at = self._clock.now()
                raise
            if found.get("issuer") != self._config.issuer:
                raise UnauthenticatedError(f"the issuer calls itself {str(found.get('issuer'))[:200]!r}")
            for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
                self._check_url(found.get(name))
            if "S256" not in found.get("code_challenge_methods_supported", ["S256"]):
                raise UnauthenticatedError("the issuer does not take PKCE with S256")
            self._metadata, self._metadata_at = found, self._clock.now()
            return found

    def verify(self, id_token: str, nonce: str) -> dict[str, Any]:
        """The claims of an ID token.

        Raises:
            UnauthenticatedError: Its signature, algorithm, issuer, audience, times or nonce are not as they must be.
        """
        claims, now = self._signed(id_token), self._clock.now()
        audience = claims.get("aud")
        audiences = audience if isinstance(audience, list) else [audience]
        problems = {
            "iss": claims.get("iss") != self._config.issuer,
            "aud": self._config.client_id not in audiences,
            "azp": (len(audiences) > 1 or "azp" in claims) and claims.get("azp") != self._config.client_id,
            "exp": not _is_time(claims.get("exp")) or claims["exp"] + LEEWAY_S <= now,
            "iat": not _is_time(claims.get("iat")) or not -LEEWAY_S <= now - claims["iat"] <= MOST_AGE_S,
            "nbf": "nbf" in claims and not (_is_time(claims["nbf"]) and claims["nbf"] - LEEWAY_S <= now),
            "nonce": not _is_same(str(claims.get("nonce", "")), nonce),
            "sub": not _is_subject(claims.get("sub")),
        }
        wrong = [name for name, is_wrong in problems.items() if is_wrong]
        if wrong:
            raise UnauthenticatedError(f"the ID token is not for this sign-in: {', '.join(wrong)}")
        return claims

    def _signed(self, id_token: str) -> dict[str, Any]:
        """What a token says that the issuer has signed; its keys are asked for again where it may have others now."""
        if self._clock.now() - self._keys_at > METADATA_S:
            self._read_keys()
        try:
            return self._decoded(id_token)
        except UnauthenticatedError:
            if not self._read_keys():
                raise
        return self._decoded(id_token)

    def _decoded(self, id_token: str) -> dict[str, Any]:
        try:
            return jwt.decode(id_token, self._key, algorithms=ALGORITHMS).claims
        except (JoseError, ValueError, RecursionError) as error:
            raise UnauthenticatedError(f"the ID token is not signed as it must be: {type(error).__name__}") from None

    def _key(self, token: Any) -> Any:
        """The issuer's key that a token names."""
        header = token.headers()
        kid, algorithm = header.get("kid"), header.get("alg")
        with self._lock:
            keys = self._keys
        if isinstance(kid, str):
            chosen = keys.get(kid)
        else:
            chosen = next(iter(keys.values())) if kid is None and len(keys) == 1 else None
        if chosen is None or chosen.get("alg") not in (None, algorithm):
            raise UnauthenticatedError("the ID token is signed with a key that the issuer does not publish")
        return chosen

    def _read_keys(self) -> bool:
        """Whether the keys were read just now: once a minute at most."""
        place = self.metadata()["jwks_uri"]
        with self._reading:  # who comes in the meantime waits for what is found
            if self._clock.now() - self._keys_at < KEYS_AT_MOST_EVERY_S:
                return False
            keys = _importable(_get(place).get("keys"))
            with self._lock:
                self._keys, self._keys_at = keys, self._clock.now()
        return True

    def _redeem(self, code: str, verifier: str, redirect_uri: str) -> dict[str, Any]:
        """Tokens for a code."""
        config = self._config
        form = {"grant_type": "authorization_code", "code": code, "redirect_uri": redirect_uri,
                "code_verifier": verifier}  # fmt: skip
        headers = dict(PLAIN)
        methods = self.metadata().get("token_endpoint_auth_methods_supported", ["client_secret_basic"])
        if config.client_secret and "client_secret_basic" in methods:
            pair = f"{quote_plus(config.client_id)}:{quote_plus(config.client_secret)}"
            headers["Authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        else:
            form["client_id"] = config.client_id
            if config.client_secret:
                form["client_secret"] = config.client_secret
        return _ask("POST", self.metadata()["token_endpoint"], data=form, headers=headers)

    def _identity(self, claims: dict[str, Any], access_token: Any) -> Identity:
        """Who it is; what the ID token does not say, the issuer is asked for."""
        wanted = ("preferred_username", "email", self._config.groups_claim)
        place = self.metadata().get("userinfo_endpoint")
        if any(name not in claims for name in wanted) and place and isinstance(access_token, str):
            self._check_url(place)
            more = _get(place, headers={"Authorization": f"Bearer {access_token}"})
            if more.get("sub") != claims["sub"]:
                raise UnauthenticatedError("the issuer speaks of somebody else")
            claims = {**more, **claims}
        groups = claims.get(self._config.groups_claim)
        named = [one for one in groups if isinstance(one, str)] if isinstance(groups, list) else []
        kept = sorted({one for one in named if 0 < len(one) <= MAX_NAME and one.isprintable()})[:MOST_GROUPS]
        name, email = (claims.get(one) for one in ("preferred_username", "email"))
        return Identity(
            subject=claims["sub"], name=name[:MAX_NAME] if isinstance(name, str) else "",
            email=email[:MAX_NAME] if isinstance(email, str) and email.isprintable() else "", groups=tuple(kept),
        )  # fmt: skip

    def _check_url(self, url: Any) -> None:
        parts = urlsplit(url if isinstance(url, str) else "")
        is_local = parts.scheme == "http" and is_loopback(parts.hostname or "")
        if not parts.hostname or not (parts.scheme == "https" or (is_local and self._is_local)):
            raise UnauthenticatedError(f"an issuer and its places are https URLs, got {str(url)[:200]!r}")

    @property
    def _is_local(self) -> bool:
        """Whether the issuer is on this machine: a test, or a proxy."""
        return is_loopback(urlsplit(self._config.issuer).hostname or "")


def _importable(listed: Any) -> dict[str, Any]:
    """The keys that signatures can be checked with, by their ids."""
    found: dict[str, Any] = {}
    for number, one in enumerate(listed if isinstance(listed, list) else []):
        if isinstance(one, dict) and one.get("kty") in KEY_TYPES and one.get("use", "sig") == "sig":
            public = {name: value for name, value in one.items() if name not in NOT_PUBLIC}
            try:
                found[str(one.get("kid", f"#{number}"))] = jwk.import_key(public)
            except (JoseError, ValueError, KeyError, TypeError):
                continue  # of a kind that is not known here: the others are good
    return found


def _is_time(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -1e12 < value < 1e12


def _is_subject(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 255 and value.isascii() and value.isprintable()


def _is_same(left: str, right: str) -> bool:
    return hmac.compare_digest(left.encode("utf-8", "replace"), right.encode("utf-8", "replace")) and bool(left)


@cache
def _trusted() -> ssl.SSLContext:
    """The authorities that certifi and this machine know: also one of one's own, or of SSL_CERT_FILE."""
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context


def _get(url: str, headers: dict[str, str] | None = None) -> dict[str, Any]:
    return _ask("GET", url, headers={**PLAIN, **(headers or {})})


def _ask(method: str, url: str, **options: Any) -> dict[str, Any]:
    """A JSON object from exactly this place: redirects are refused, whoever they lead to.

    Raises:
        UnavailableError: It does not answer, or fails.
        UnauthenticatedError: It refuses, redirects, or what it says is too long or no object.
    """
    host = urlsplit(url).hostname
    try:
        with (
            httpx.Client(verify=_trusted(), timeout=TIMEOUT_S, follow_redirects=False, trust_env=False) as http,
            http.stream(method, url, **options) as answer,
        ):
            if answer.is_redirect:
                raise UnauthenticatedError(f"{host} redirects to elsewhere, where it must answer itself")
            data = b""
            for part in answer.iter_raw():
                data += part
                if len(data) > MAX_BYTES:
                    raise UnauthenticatedError(f"{host} says more than {MAX_BYTES} bytes")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnavailableError(f"{host} does not answer: {type(error).__name__}") from None
    if answer.status_code >= 500:
        raise UnavailableError(f"{host} failed with {answer.status_code}")
    try:
        found = msgspec.json.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        found = None
    if answer.is_error or not isinstance(found, dict):
        reason = found.get("error") if isinstance(found, dict) else "no JSON object"
        raise UnauthenticatedError(f"{host} refused with {answer.status_code}: {str(reason)[:100]!r}")
    return found
