"""The keyring: where keys come from, what is refused, and that nothing of them is shown."""

from __future__ import annotations

import base64
import json
import os
import shlex
import sys
import threading
from pathlib import Path

import pytest

from millrace.core.errors import ConflictError, CorruptError, InputError, NotFoundError, UnavailableError
from millrace.security import keyring
from millrace.security.keyring import Keyring, key_id

KEY = bytes(range(32))


def test_the_homes_own_file_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    assert not (tmp_path / "keys").exists()
    current = ring.current
    assert Keyring(tmp_path).current == current
    assert (tmp_path / "keys/kek.json").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o700


def test_threads_and_processes_that_begin_together_have_one_key(tmp_path: Path) -> None:
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(Keyring(tmp_path).current)) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert len(found) == 12


@pytest.mark.parametrize(
    "spelled", [KEY, KEY.hex().encode(), KEY.hex().upper().encode() + b"\n", base64.b64encode(KEY)]
)
def test_one_key_in_any_spelling(tmp_path: Path, spelled: bytes) -> None:
    (tmp_path / "key").write_bytes(spelled)
    assert Keyring(tmp_path, f"file:{tmp_path}/key").current == key_id(KEY)


def test_the_environment_and_a_command_give_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEK", KEY.hex())
    from_variable = Keyring(tmp_path, "env:KEK")
    assert (from_variable.current, from_variable.variable) == (key_id(KEY), "KEK")
    monkeypatch.delenv("KEK")
    assert from_variable.has(key_id(KEY))  # read once
    count = tmp_path / "count"
    program = f"open({str(count)!r}, 'a').write('x'); print({KEY.hex()!r})"
    by_command = Keyring(tmp_path, f"command:{shlex.join([sys.executable, '-c', program])}")
    assert by_command.current == key_id(KEY)
    assert by_command.has(key_id(KEY))
    assert count.read_text() == "x"


def test_a_command_is_no_shell(tmp_path: Path) -> None:
    with pytest.raises((InputError, NotFoundError, UnavailableError)):
        Keyring(tmp_path, f"command:true ; touch {tmp_path}/made").current  # noqa: B018 - reading is the point
    assert not (tmp_path / "made").exists()


def test_commands_that_fail_say_nothing_of_what_they_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keyring, "COMMAND_TIMEOUT_S", 0.5)
    programs = ["print('canary'); raise SystemExit(3)", "print('canary')", "print('canary', flush=True); "
                "import time; time.sleep(30)", "import sys; sys.stderr.write('canary'); sys.exit(1)"]  # fmt: skip
    for program in programs:
        with pytest.raises((InputError, UnavailableError)) as raised:
            Keyring(tmp_path, f"command:{shlex.join([sys.executable, '-c', program])}").current  # noqa: B018
        assert "canary" not in f"{raised.value} {raised.value.hint} {raised.value.details}"
    with pytest.raises(InputError, match="does not start"):
        Keyring(tmp_path, f"command:{tmp_path}/nothing").current  # noqa: B018
    assert "canary" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "content", [b"", b"short", b"\xff" * 31, b"{}", b'{"current": "x", "keys": []}', b"{" * 9, b"z" * 64]
)
def test_what_is_no_key_is_refused_and_not_shown(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(InputError, match="key") as raised:
        Keyring(tmp_path, f"file:{tmp_path}/key").current  # noqa: B018
    assert len(content) < 4 or content.decode("latin-1") not in str(raised.value)


def test_a_ring_whose_id_is_not_its_keys_is_refused(tmp_path: Path) -> None:
    entry = {"id": "kek-000000000000", "key": base64.b64encode(KEY).decode()}
    (tmp_path / "key").write_text(json.dumps({"current": entry["id"], "keys": [entry]}))
    with pytest.raises(InputError, match="not whole"):
        Keyring(tmp_path, f"file:{tmp_path}/key").current  # noqa: B018


@pytest.mark.parametrize("source", ["somewhere", "file:", "https://x", "env", KEY.hex()])
def test_a_setting_that_is_none_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(InputError, match="file:PATH") as refused:
        Keyring(tmp_path, source)
    assert KEY.hex()[:8] not in str(refused.value), "it may be the key itself"


def test_a_file_that_everybody_can_read_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "key").write_bytes(KEY)
    (tmp_path / "key").chmod(0o600)
    Keyring(tmp_path, f"file:{tmp_path}/key")
    assert not caplog.records
    (tmp_path / "key").chmod(0o644)
    assert Keyring(tmp_path, f"file:{tmp_path}/key").current == key_id(KEY)
    assert "chmod 600" in caplog.text


def test_no_file_is_made_where_something_is_encrypted(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="something here is encrypted"):
        Keyring(tmp_path, f"file:{tmp_path}/key", may_make=False).current  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_vanishes_is_not_replaced(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    assert ring.current
    (tmp_path / "keys/kek.json").unlink()
    with pytest.raises(NotFoundError):
        ring.wrap(b"x", "c")
    assert not (tmp_path / "keys/kek.json").exists()


def test_rotation_is_seen_by_others_and_old_keys_still_open(tmp_path: Path) -> None:
    ours, others = Keyring(tmp_path), Keyring(tmp_path)
    first, wrapped = ours.wrap(b"data key", "c")
    second = ours.add(now=5.0)
    assert second != first
    assert (others.current, others.unwrap(first, wrapped, "c")) == (second, b"data key")
    assert [one.created_at for one in others.entries] == [0.0, 5.0]
    with pytest.raises(ConflictError, match="current"):
        ours.drop(second)
    ours.drop(first)
    with pytest.raises(NotFoundError, match="not here"):
        others.unwrap(first, wrapped, "c")
    with pytest.raises(NotFoundError, match="no key"):
        ours.drop(first)
    assert (tmp_path / "keys/kek.json").stat().st_mode & 0o777 == 0o600
    assert not list((tmp_path / "keys").glob(".kek.json.0*"))


def test_keys_that_come_from_elsewhere_are_not_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEK", KEY.hex())
    for change in (lambda ring: ring.add(0.0), lambda ring: ring.drop("x")):
        with pytest.raises(InputError, match="does not write"):
            change(Keyring(tmp_path, "env:KEK"))


def test_secrets_from_before_a_key_was_named_still_open(tmp_path: Path) -> None:
    sealed = Keyring(tmp_path).seal(b"value", "secret")
    (tmp_path / "other").write_bytes(os.urandom(32))
    named = Keyring(tmp_path, f"file:{tmp_path}/other")
    assert named.unseal(sealed, "secret") == b"value"
    assert not named.seal(b"value", "secret").startswith(sealed.partition(":")[0])


def test_what_is_sealed_opens_for_its_context_only(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    sealed = ring.seal(b"value", "secret p/A 1")
    kek, _, wrapped = sealed.partition(":")
    for text, context in ((sealed, "secret p/B 1"), (f"{kek}:AAAA", "secret p/A 1"), (f"{kek}:é", "secret p/A 1")):
        with pytest.raises(CorruptError):
            ring.unseal(text, context)
    with pytest.raises(NotFoundError):
        ring.unseal(f"kek-unknown:{wrapped}", "secret p/A 1")


def test_nothing_of_a_key_is_in_its_repr(tmp_path: Path) -> None:
    ring = Keyring(tmp_path)
    (entry,) = ring.entries
    assert entry.key not in f"{ring!r} {entry!r} {ring.entries!r}"
