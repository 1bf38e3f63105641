"""OpenID Connect against an issuer that lies: RFC 8725 (algorithms), OpenID Connect Core 3.1.3.7, RFC 9207 (mix-up).

A real one over HTTP, on loopback, with real keys: each test makes it, or the browser, do one thing wrong.
"""

from __future__ import annotations

import gzip
import hmac
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from joserfc.jwk import ECKey, RSAKey
from oidc_issuer import NOW, RSA, Issuer, b64, by_hand, rs256

from millrace.core.clock import FakeClock
from millrace.core.errors import UnauthenticatedError, UnavailableError
from millrace.security import oidc

BACK = "http://127.0.0.1/login/callback"
OTHER, EC = RSAKey.generate_key(2048), ECKey.generate_key("P-256")


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as made:
        yield made


# --------------------------------------------------------------------------- signatures


def with_secret(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda body: hmac.digest(secret, body, "sha256")


@pytest.mark.parametrize("alg", ["RS256", "RS512", "PS256"])
def test_what_the_issuer_has_signed_is_believed(issuer: Issuer, alg: str) -> None:
    assert issuer.provider().verify(issuer.token(alg=alg), "n")["sub"] == "s-1"
    issuer.published = [{**EC.as_dict(private=False), "kid": "curve"}]
    assert issuer.provider().verify(issuer.token(EC, "ES256", "curve"), "n")["sub"] == "s-1"


@pytest.mark.parametrize("alg", ["none", "None", "nOnE", "", "HS256", "RS1", 7, None])
def test_no_token_chooses_how_it_is_checked(issuer: Issuer, alg: Any) -> None:
    for sign in (lambda _: b"", with_secret(b"")):
        with pytest.raises(UnauthenticatedError):
            issuer.provider().verify(by_hand({"alg": alg, "kid": "one"}, issuer.claims(), sign), "n")


def test_a_public_key_is_no_shared_secret(issuer: Issuer) -> None:
    """RS/HS confusion (CVE-2015-9235, CVE-2022-39227): also where a careless issuer lists its key as one."""
    published = json.dumps(issuer.published[0]).encode()
    secrets = (RSA.as_pem(private=False), RSA.as_pem(private=False).strip(), RSA.as_der(private=False), published)
    for secret in secrets:
        for listed in ([], [{"kty": "oct", "k": b64(secret), "kid": "shared"}]):
            issuer.published = [issuer.published[0], *listed]
            for kid in ("one", "shared", None):
                forged = by_hand({"alg": "HS256", "kid": kid}, issuer.claims(), with_secret(secret))
                with pytest.raises(UnauthenticatedError):
                    issuer.provider().verify(forged, "n")
    assert not any(alg.startswith("HS") for alg in oidc.ALGORITHMS)
    assert oidc._importable([{"kty": "oct", "k": b64(b"secret" * 8), "kid": "shared"}]) == {}


def test_a_key_signs_as_it_says(issuer: Issuer) -> None:
    issuer.published[0]["alg"] = "RS256"
    assert issuer.provider().verify(issuer.token(), "n")
    with pytest.raises(UnauthenticatedError, match="does not publish"):
        issuer.provider().verify(issuer.token(alg="PS256"), "n")
    issuer.published[0] = {**RSA.as_dict(private=False), "kid": "one", "use": "enc"}
    with pytest.raises(UnauthenticatedError, match="does not publish"):
        issuer.provider().verify(issuer.token(), "n")


def test_a_foreign_or_an_altered_signature(issuer: Issuer) -> None:
    good = issuer.token()
    head, _, tail = good.split(".")
    altered = f"{head}.{b64(json.dumps(issuer.claims(sub='root')).encode())}.{tail}"
    foreign = issuer.token(OTHER)
    embedded = by_hand({"alg": "RS256", "jwk": OTHER.as_dict(private=False)}, issuer.claims(), lambda _: b"x")
    for bad in (altered, foreign, embedded, good[:-8], f"{good}.", "", "a.b.c", "..", good + "é", "\ud800.a.b"):
        with pytest.raises(UnauthenticatedError):
            issuer.provider().verify(bad, "n")


@pytest.mark.parametrize("claims", [[], "x", None, 1])
def test_claims_are_an_object(issuer: Issuer, claims: Any) -> None:
    signed = by_hand({"alg": "RS256", "kid": "one"}, claims, lambda body: rs256(body))
    with pytest.raises(UnauthenticatedError):
        issuer.provider().verify(signed, "n")


def test_claims_of_any_depth(issuer: Issuer) -> None:
    body = f"{b64(json.dumps({'alg': 'RS256', 'kid': 'one'}).encode())}.{b64(b'[' * 200_000)}"
    with pytest.raises(UnauthenticatedError):
        issuer.provider().verify(f"{body}.{b64(rs256(body.encode()))}", "n")


# --------------------------------------------------------------------------- keys that change


def test_keys_rotate_and_strangers_make_nobody_ask_often(issuer: Issuer) -> None:
    provider = issuer.provider()
    provider.verify(issuer.token(), "n")
    issuer.published = [{**OTHER.as_dict(private=False), "kid": "two"}]
    for _ in range(50):
        with pytest.raises(UnauthenticatedError, match="does not publish"):
            provider.verify(issuer.token(OTHER, kid="forged"), "n")
    assert issuer.asked.count("/jwks") == 1
    issuer.clock.sleep(oidc.KEYS_AT_MOST_EVERY_S)
    assert provider.verify(issuer.token(OTHER, kid="two"), "n")
    for _ in range(50):
        with pytest.raises(UnauthenticatedError):
            provider.verify(issuer.token(kid="one"), "n")  # withdrawn
    assert issuer.asked.count("/jwks") == 2


def test_a_withdrawn_key_is_gone_within_the_hour_and_one_without_a_name_may_change(issuer: Issuer) -> None:
    provider = issuer.provider()
    issuer.published = [RSA.as_dict(private=False)]
    issuer.published[0].pop("kid", None)
    assert provider.verify(issuer.token(kid=None), "n")
    issuer.published = [{name: value for name, value in OTHER.as_dict(private=False).items() if name != "kid"}]
    issuer.clock.sleep(oidc.KEYS_AT_MOST_EVERY_S)
    assert provider.verify(issuer.token(OTHER, kid=None), "n")
    issuer.published = [{**EC.as_dict(private=False), "kid": "three"}]
    issuer.clock.sleep(oidc.METADATA_S + 1)
    with pytest.raises(UnauthenticatedError):
        provider.verify(issuer.token(OTHER, kid=None), "n")


def test_of_two_keys_the_token_has_to_name_one(issuer: Issuer) -> None:
    issuer.published.append({**OTHER.as_dict(private=False), "kid": "two"})
    with pytest.raises(UnauthenticatedError):
        issuer.provider().verify(issuer.token(kid=None), "n")


def test_keys_that_are_none_do_not_hide_the_others(issuer: Issuer) -> None:
    issuer.published = [{"kty": "RSA", "kid": "bad"}, {"kty": "EC", "crv": "P-0", "x": "a", "y": "b"}, 7, {"kty": "EC", "crv": []},  # type: ignore[list-item]
                        {"kty": "OKP"}, {"kty": "RSA", "n": 3, "e": []}, *issuer.published]  # fmt: skip
    assert issuer.provider().verify(issuer.token(), "n")


@pytest.mark.parametrize("body", [b"[" * 300_000, b'{"keys": "' + b"x" * (1 << 20) + b'"}', b"{}", b"[]", b"\xff"])
def test_keys_that_are_too_much_or_nothing(issuer: Issuer, body: bytes) -> None:
    issuer.replaced["/jwks"] = (200, {}, body)
    with pytest.raises(UnauthenticatedError):
        issuer.provider().verify(issuer.token(), "n")


def test_a_huge_list_of_keys_though_the_right_one_is_in_it(issuer: Issuer) -> None:
    for filling, is_read in ((oidc.MAX_BYTES // 2, True), (oidc.MAX_BYTES, False)):
        listed = json.dumps({"keys": issuer.published, "x": "x" * filling}).encode()
        issuer.replaced["/jwks"] = (200, {}, listed)
        if is_read:
            assert issuer.provider().verify(issuer.token(), "n")
        else:
            with pytest.raises(UnauthenticatedError, match="says more than"):
                issuer.provider().verify(issuer.token(), "n")


def test_a_packed_answer_is_not_unpacked(issuer: Issuer) -> None:
    issuer.replaced["/jwks"] = (200, {"Content-Encoding": "gzip"}, gzip.compress(json.dumps({"keys": []}).encode()))
    with pytest.raises(UnauthenticatedError, match="no JSON object"):
        issuer.provider().verify(issuer.token(), "n")


# --------------------------------------------------------------------------- claims


WRONG: dict[str, tuple[Any, ...]] = {
    "iss": (None, "https://evil.example", "", 1),
    "aud": (None, "other", [], ["other"], "", {"millrace": 1}, "millrac", ["millrace", "other"]),
    "azp": ("other", ""),
    "exp": (None, NOW - 61, "never", True, float("inf"), float("nan"), 0, -1),
    "iat": (None, NOW + 120, NOW - 601, "now", float("nan")),
    "nbf": (NOW + 120, "x", float("nan"), True),
    "nonce": (None, "", "N", "n ", ["n"], 1, "\ud800"),
    "sub": (None, "", 7, "x" * 256, "ad\u00e4", "a\nb", "\ud800"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_token_that_is_not_for_this_sign_in(issuer: Issuer, name: str, value: Any) -> None:
    with pytest.raises(UnauthenticatedError, match=rf"not for this sign-in: (aud, )?{'azp' if value == ['millrace', 'other'] else name}"):  # fmt: skip
        issuer.provider().verify(issuer.token(**{name: value}), "n")


def test_a_token_for_several_that_names_us(issuer: Issuer) -> None:
    assert issuer.provider().verify(issuer.token(aud=["millrace", "other"], azp="millrace", nbf=NOW), "n")
    with pytest.raises(UnauthenticatedError, match="nonce"):
        issuer.provider().verify(issuer.token(nonce=""), "")


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[Issuer, oidc.Provider]]:
    with Issuer() as made:
        yield made, made.provider()


@settings(deadline=None)  # the issuer is asked for its keys over HTTP
@given(
    changes=st.dictionaries(
        st.sampled_from([*WRONG, "groups"]), st.none() | st.integers() | st.text() | st.floats() | st.lists(st.text())
    )
)
def test_any_claims_are_believed_or_refused(shared: tuple[Issuer, oidc.Provider], changes: dict[str, Any]) -> None:
    made, provider = shared
    try:
        claims = provider.verify(made.token(**changes), "n")
    except UnauthenticatedError:
        return
    assert claims["nonce"] == "n"
    assert "iss" not in changes or changes["iss"] in (None, made.url)


# --------------------------------------------------------------------------- the way there and back


def test_there_and_back(issuer: Issuer) -> None:
    provider = issuer.provider()
    place, pending = provider.begin(BACK)
    query = parse_qs(urlsplit(place).query)
    assert query["code_challenge_method"] == ["S256"]
    assert pending["verifier"] not in place
    assert len({*pending.values(), *provider.begin(BACK)[1].values()}) == 6, "all of it anew each time"
    who = provider.finish(pending, issuer.approve(place, groups=["staff", "", "a\nb", 7, "staff", "\ud800"]), BACK)
    assert (who.subject, who.name, who.email, who.groups) == ("s-1", "ada", "ada@example.org", ("staff",))


@pytest.mark.parametrize("state", ["", "other", None, "é", "\ud800"])
def test_an_answer_without_its_state(issuer: Issuer, state: str | None) -> None:
    provider = issuer.provider()
    place, pending = provider.begin(BACK)
    answer = issuer.approve(place)
    changed = {**answer, "state": state} if state is not None else {"code": answer["code"]}
    for held in (pending, {**pending, "state": ""}, {}):
        with pytest.raises(UnauthenticatedError, match="state"):
            provider.finish(held, changed, BACK)
    assert "/token" not in issuer.asked


def test_a_code_without_its_verifier_nonce_or_a_second_time(issuer: Issuer) -> None:
    provider = issuer.provider()
    for held in ({"verifier": "other"}, {"verifier": ""}):
        place, pending = provider.begin(BACK)
        with pytest.raises(UnauthenticatedError, match="invalid_grant"):
            provider.finish({**pending, **held}, issuer.approve(place), BACK)
    place, pending = provider.begin(BACK)
    answer = issuer.approve(place)
    for held in ({}, {"nonce": "of another browser"}):
        with pytest.raises(UnauthenticatedError, match="nonce"):
            provider.finish({**pending, "nonce": "", **held}, issuer.approve(place), BACK)
    assert provider.finish(pending, answer, BACK).subject == "s-1"
    with pytest.raises(UnauthenticatedError, match="invalid_grant"):
        provider.finish(pending, answer, BACK)


def test_a_refusal_there(issuer: Issuer) -> None:
    provider = issuer.provider()
    _, pending = provider.begin(BACK)
    with pytest.raises(UnauthenticatedError, match="access_denied"):
        provider.finish(pending, {"state": pending["state"], "error": "access_denied"}, BACK)


def test_another_issuer_answers(issuer: Issuer) -> None:
    """Mix-up (RFC 9207): a code of one issuer is never sent to another."""
    for always, given_iss in (
        (False, "https://evil.example"),
        (True, "https://evil.example"),
        (True, None),
        (True, ""),
    ):
        issuer.metadata["authorization_response_iss_parameter_supported"] = always
        provider = issuer.provider()
        place, pending = provider.begin(BACK)
        answer = issuer.approve(place) | ({} if given_iss is None else {"iss": given_iss})
        with pytest.raises(UnauthenticatedError, match="another issuer"):
            provider.finish(pending, answer, BACK)
        assert "/token" not in issuer.asked
        assert provider.finish(pending, {**answer, "iss": issuer.url}, BACK)
        issuer.asked.clear()


def test_userinfo_of_somebody_else(issuer: Issuer) -> None:
    issuer.metadata["userinfo_endpoint"] = f"{issuer.url}/me"
    for more, is_same in (({"sub": "s-1", "groups": ["a"]}, True), ({"sub": "s-2"}, False), ({}, False)):
        issuer.replaced["/me"] = (200, {}, json.dumps(more).encode())
        provider = issuer.provider()
        place, pending = provider.begin(BACK)
        answer = issuer.approve(place, groups=None)
        if is_same:
            assert provider.finish(pending, answer, BACK).groups == ("a",)
        else:
            with pytest.raises(UnauthenticatedError, match="somebody else"):
                provider.finish(pending, answer, BACK)


# --------------------------------------------------------------------------- discovery


@pytest.mark.parametrize(
    "url", ["http://idp.example", "http://169.254.169.254", "http://10.0.0.1", "ftp://127.0.0.1", "file:///etc/passwd", "", "idp.example",
            "http://127.0.0.1.example", "http://localhost.evil.example", "https://"],
)  # fmt: skip
def test_an_issuer_in_plain_text_is_none(issuer: Issuer, url: str) -> None:
    with pytest.raises(UnauthenticatedError, match="https URL"):
        oidc.Provider(oidc.Config(issuer=url, client_id="m"), FakeClock())
    for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
        before, issuer.metadata[name] = issuer.metadata[name], url
        with pytest.raises(UnauthenticatedError, match="https URL"):
            issuer.provider().begin(BACK)
        issuer.metadata[name] = before


def test_what_a_far_issuer_names_is_not_on_this_machine() -> None:
    provider = oidc.Provider(oidc.Config(issuer="https://idp.example", client_id="m"), FakeClock())
    with pytest.raises(UnauthenticatedError, match="https URL"):
        provider._check_url("http://127.0.0.1:9/token")


@pytest.mark.parametrize("path", ["/.well-known/openid-configuration", "/jwks", "/token"])
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_not_followed(issuer: Issuer, path: str, status: int) -> None:
    """To loopback, here: what it leads to would answer, and well."""
    place = "/elsewhere"
    issuer.replaced[place] = issuer.says(path, {})
    issuer.replaced[path] = (status, {"Location": f"{issuer.url}{place}"}, b"")
    provider = issuer.provider()

    def go() -> None:
        where, pending = provider.begin(BACK)
        provider.finish(pending, issuer.approve(where), BACK)

    with pytest.raises(UnauthenticatedError, match="redirects"):
        go()
    assert place not in issuer.asked


def test_an_issuer_in_anothers_name_or_without_pkce(issuer: Issuer) -> None:
    for changes, reason in (({"issuer": "https://evil.example"}, "calls itself"), ({"issuer": None}, "calls itself"),
                            ({"code_challenge_methods_supported": ["plain"]}, "PKCE")):  # fmt: skip
        before = dict(issuer.metadata)
        issuer.metadata.update(changes)
        with pytest.raises(UnauthenticatedError, match=reason):
            issuer.provider().begin(BACK)
        issuer.metadata = before


def test_nobody_waits_again_and_again_for_one_that_is_away(issuer: Issuer) -> None:
    provider = issuer.provider()
    where = "/.well-known/openid-configuration"
    issuer.replaced[where] = (503, {}, b"")
    for _ in range(5):
        with pytest.raises(UnavailableError):
            provider.begin(BACK)
    assert issuer.asked.count(where) == 1
    del issuer.replaced[where]
    issuer.clock.sleep(oidc.AGAIN_S)
    assert provider.begin(BACK)


def test_a_client_with_a_secret_proves_itself_as_the_issuer_wants(issuer: Issuer) -> None:
    seen: list[dict[str, str]] = []
    says = issuer.says

    def remember(path: str, form: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        seen.append(form)
        return says(path, form)

    issuer.says = remember  # type: ignore[method-assign]
    for methods, is_in_form in ((None, False), (["client_secret_post"], True), (["client_secret_basic"], False)):
        issuer.metadata.pop("token_endpoint_auth_methods_supported", None)
        if methods:
            issuer.metadata["token_endpoint_auth_methods_supported"] = methods
        provider = issuer.provider(client_secret="s&cret")
        where, pending = provider.begin(BACK)
        seen.clear()
        provider.finish(pending, issuer.approve(where), BACK)
        form = next(one for one in seen if "code" in one)
        assert (form.get("client_secret") == "s&cret") == is_in_form
