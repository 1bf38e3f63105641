"""Passwords: what is refused, what is kept, how many at once."""

from __future__ import annotations

import threading

import pytest
from argon2 import PasswordHasher, extract_parameters
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.core.errors import InputError, UnavailableError
from millrace.security import passwords
from millrace.security.passwords import Desk, check_new_password, check_password, hash_password

BAD = [
    "", "short", "password", "Password1234", "passwordpassword", "PASSWORD!!!!!", "admin", "administrator1", "root12345678",
    "changeme12345", "aaaaaaaaaaaa", "abababababab", "123456789012", "210987654321", "abcdefghijkl", "millrace2026!",
    "welcome-welcome", "letmein.letmein.", "             ", "ada.lovelace.1", "lovelace12345", "AdaAdaAdaAda", "x" * 1001,
]  # fmt: skip


@pytest.mark.parametrize("password", BAD)
def test_empty_default_and_own_names_are_refused(password: str) -> None:
    with pytest.raises(InputError) as caught:
        check_new_password(password, ["ada", "ada.lovelace@example.org"])
    assert len(password) < 9 or password not in str(caught.value.to_dict())


@pytest.mark.parametrize("password", ["blue tractor on mars", "Tr0ub4dor&3xkcd", "пароль на всю жизнь", "7G#kq9!Lz@2p"])
def test_others_are_not(password: str) -> None:
    check_new_password(password, ["ada", "ada@example.org"])


@given(st.text(max_size=60), st.lists(st.text(max_size=20), max_size=2))
def test_any_text_is_taken_or_refused(password: str, names: list[str]) -> None:
    try:
        check_new_password(password, names)
    except InputError:
        return
    assert len(password) > 3


def test_a_hash_is_argon2id_with_64_mib_and_a_salt_of_its_own() -> None:
    first, second = hash_password("blue tractor on mars"), hash_password("blue tractor on mars")
    assert first != second
    assert first.startswith("$argon2id$v=19$m=65536,t=3,p=1$")
    assert "tractor" not in first


def test_the_right_one_alone_is_right() -> None:
    stored = hash_password("gr\u00fcn boats at noon")
    assert check_password(stored, "gru\u0308n boats at noon").result(), "whichever way a keyboard spells it"
    assert not check_password(stored, "grun boats at noon").result()
    assert not check_password(stored, "").result()


def test_nobodys_password_is_hashed_and_never_right(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = passwords._HASHER

    class Watched:
        def verify(self, stored: str, password: str) -> bool:
            asked.append(stored)
            return real.verify(stored, password)

    passwords._nobodys()
    monkeypatch.setattr(passwords, "_HASHER", Watched())
    assert not check_password("", "").result()
    assert not check_password("", "blue tractor on mars").result()
    assert not check_password("no hash", "x").result()
    assert [one[:31] for one in asked[:2]] == ["$argon2id$v=19$m=65536,t=3,p=1$"] * 2, "the same work as for somebody"


def test_what_a_name_of_nobody_is_checked_against_costs_no_work_to_make(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the first wrong name since a start would be known by its taking twice as long."""
    whole = hash_password("blue tractor on mars")
    monkeypatch.setattr(PasswordHasher, "hash", None)
    made = passwords._nobodys.__wrapped__()
    assert extract_parameters(made) == extract_parameters(whole)
    assert len(made) == len(whole)
    assert made != passwords._nobodys.__wrapped__()


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(0, 5))
def test_a_desk_does_few_at_once_and_refuses_the_rest(at_once: int, waiting: int) -> None:
    desk, go, lock = Desk(at_once, waiting), threading.Event(), threading.Lock()
    running, most = 0, 0

    def work() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        go.wait(10)
        with lock:
            running -= 1

    futures = [desk.submit(work) for _ in range(at_once + waiting)]
    with pytest.raises(UnavailableError, match="too many passwords"):
        desk.submit(work)
    go.set()
    for future in futures:
        future.result(10)
    assert most <= at_once
    desk.submit(str).result(10)
