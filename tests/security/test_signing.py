"""Signatures: own and trusted keys are accepted, everything else is refused."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from millrace.cli.main import cli
from millrace.cli.session import Session
from millrace.core.errors import InputError, UntrustedError
from millrace.core.ids import digest_bytes
from millrace.security.signing import HomeSigner, public_key_id
from millrace.wiring import open_dispatcher, open_transport

DIGEST, OTHER = digest_bytes(b"bundle"), digest_bytes(b"altered bundle")


def trust(home: Path, public_key: bytes, name: str = "friend") -> Path:
    """Put a key among the trusted ones."""
    path = home / "keys/trusted" / f"{name}.pub"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(public_key)
    return path


def test_the_key_is_made_on_first_use_for_its_owner_only(tmp_path: Path) -> None:
    signer = HomeSigner(tmp_path)
    assert list(tmp_path.iterdir()) == []
    signature = signer.sign(DIGEST)
    assert (tmp_path / "keys/signing.key").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "keys").stat().st_mode & 0o077 == 0
    assert sorted(one.name for one in (tmp_path / "keys").iterdir()) == ["signing.key", "signing.pub"]
    assert (tmp_path / "keys/signing.pub").read_bytes() == signer.public_key()
    assert HomeSigner(tmp_path).verify(DIGEST, signature) == signer.key_id
    assert HomeSigner(tmp_path).sign(DIGEST) == signature


def test_the_document_says_who_signed_what(tmp_path: Path) -> None:
    signer = HomeSigner(tmp_path)
    document = json.loads(signer.sign(DIGEST))
    assert {key: document[key] for key in ("algorithm", "digest", "key_id")} == {
        "algorithm": "ed25519", "digest": DIGEST, "key_id": signer.key_id,
    }  # fmt: skip
    key = serialization.load_pem_public_key(signer.public_key())
    key.verify(base64.b64decode(document["signature"]), b"millrace signature v1\n" + DIGEST.encode())  # type: ignore[union-attr,call-arg]


def test_verifying_makes_no_key(tmp_path: Path) -> None:
    signature = HomeSigner(tmp_path / "a").sign(DIGEST)
    with pytest.raises(UntrustedError, match="not trusted"):
        HomeSigner(tmp_path / "b").verify(DIGEST, signature)
    assert not (tmp_path / "b").exists()


def test_unsigned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UntrustedError, match="unsigned"):
        HomeSigner(tmp_path).verify(DIGEST, b"")


def test_other_content_is_refused(tmp_path: Path) -> None:
    signer = HomeSigner(tmp_path)
    with pytest.raises(UntrustedError, match="altered"):
        signer.verify(OTHER, signer.sign(DIGEST))
    document = json.loads(signer.sign(DIGEST)) | {"digest": OTHER}
    with pytest.raises(UntrustedError, match="wrong"):
        signer.verify(OTHER, json.dumps(document).encode())


def test_an_altered_bundle_signed_again_with_another_key_is_refused(tmp_path: Path) -> None:
    signer, thief = HomeSigner(tmp_path / "home"), HomeSigner(tmp_path / "thief")
    signer.sign(DIGEST)
    forged = thief.sign(OTHER)
    with pytest.raises(UntrustedError, match="not trusted"):
        signer.verify(OTHER, forged)
    pretending = json.loads(forged) | {"key_id": signer.key_id}
    with pytest.raises(UntrustedError, match="wrong"):
        signer.verify(OTHER, json.dumps(pretending).encode())


def test_a_trusted_key_is_accepted_until_it_is_removed(tmp_path: Path) -> None:
    friend, here = HomeSigner(tmp_path / "friend"), HomeSigner(tmp_path / "here")
    signature = friend.sign(DIGEST)
    path = trust(tmp_path / "here", friend.public_key())
    assert here.verify(DIGEST, signature) == friend.key_id
    path.unlink()
    with pytest.raises(UntrustedError, match=friend.key_id):
        here.verify(DIGEST, signature)


def test_the_hint_is_the_command_that_trusts_the_signer(tmp_path: Path) -> None:
    with closing(open_dispatcher(str(tmp_path / "here"))) as here:
        friend = HomeSigner(tmp_path / "friend")
        signature = friend.sign(DIGEST)
        with pytest.raises(UntrustedError) as refused:
            here.services.signer.verify(DIGEST, signature)
        (command,) = re.findall("`millrace (.+)`", refused.value.hint)
        words = command.replace("SIGNERS_HOME", str(tmp_path / "friend")).split()
        arguments = ["--home", str(tmp_path / "here"), *words]
        done = CliRunner().invoke(cli, arguments, obj=Session(open_transport), prog_name="millrace")
        assert done.exit_code == 0, done.output
        assert here.services.signer.verify(DIGEST, signature) == friend.key_id


@pytest.mark.parametrize("kind", ["own", "file", "shared"])
def test_a_key_counts_only_while_nothing_speaks_against_it(tmp_path: Path, kind: str) -> None:
    friend, refusals = HomeSigner(tmp_path / "friend"), dict[str, str]()
    if kind == "file":
        trust(tmp_path / "here", friend.public_key())
    shared = {friend.key_id: friend.public_key()} if kind == "shared" else {}
    here = HomeSigner(tmp_path / ("friend" if kind == "own" else "here"), shared.get, refusals.get)
    signature = friend.sign(DIGEST)
    assert here.verify(DIGEST, signature) == friend.key_id
    refusals[friend.key_id] = "was revoked on 2027-01-31"
    with pytest.raises(UntrustedError, match="which was revoked on 2027-01-31") as refused:
        here.verify(DIGEST, signature)
    assert "register them again" in refused.value.hint
    with pytest.raises(UntrustedError, match="altered"):
        here.verify(OTHER, signature)
    del refusals[friend.key_id]
    assert here.verify(DIGEST, signature) == friend.key_id


def test_a_revoked_own_key_signs_nothing_and_the_hint_makes_another_one(tmp_path: Path) -> None:
    refusals: dict[str, str] = {}
    signer = HomeSigner(tmp_path, None, refusals.get)
    signer.sign(DIGEST)
    refusals[signer.key_id] = "was revoked"
    with pytest.raises(UntrustedError, match="nothing is signed") as refused:
        signer.sign(DIGEST)
    (command,) = re.findall("`(mv .+)`", refused.value.hint)
    subprocess.run(command.split(), check=True)
    assert signer.verify(DIGEST, signer.sign(DIGEST)) not in refusals


def test_held_keys_are_named_by_their_files(tmp_path: Path) -> None:
    friend, here = HomeSigner(tmp_path / "friend"), HomeSigner(tmp_path / "here")
    assert here.held() == {}
    trust(tmp_path / "here", friend.public_key())
    assert here.held() == {friend.key_id: "trusted/friend.pub"}
    own = here.key_id
    assert here.held() == {friend.key_id: "trusted/friend.pub", own: "signing.key"}


@pytest.mark.parametrize("text", [b"", b"nonsense", b"-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n"])
def test_what_is_no_public_key_is_refused(text: bytes) -> None:
    with pytest.raises(InputError, match="public key as PEM"):
        public_key_id(text)


def test_a_key_has_one_id(tmp_path: Path) -> None:
    signer = HomeSigner(tmp_path)
    assert public_key_id(signer.public_key()) == signer.key_id
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    with pytest.raises(InputError, match="another kind"):
        public_key_id(other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    signer = HomeSigner(tmp_path_factory.mktemp("home"))
    signature = signer.sign(DIGEST)
    place = data.draw(st.integers(0, len(signature) - 1))
    changed = signature[:place] + bytes([signature[place] ^ data.draw(st.integers(1, 255))]) + signature[place + 1 :]
    assert signer.verify(DIGEST, signature) == signer.key_id
    with pytest.raises(UntrustedError):
        signer.verify(DIGEST, changed)


@pytest.mark.parametrize(
    "signature", [b"x", b"{}", b"[]", b"null", b"\xff\xfe", b'{"algorithm": "none"}', b"[" * 10_000]
)
def test_what_is_no_document_is_refused(tmp_path: Path, signature: bytes) -> None:
    with pytest.raises(UntrustedError, match="not a signature document"):
        HomeSigner(tmp_path).verify(DIGEST, signature)


def test_another_algorithm_is_refused(tmp_path: Path) -> None:
    signer = HomeSigner(tmp_path)
    document = json.loads(signer.sign(DIGEST)) | {"algorithm": "none", "signature": ""}
    with pytest.raises(UntrustedError, match="none"):
        signer.verify(DIGEST, json.dumps(document).encode())


def test_a_key_that_others_can_read_is_not_used(tmp_path: Path) -> None:
    signer = HomeSigner(tmp_path)
    signer.sign(DIGEST)
    (tmp_path / "keys/signing.key").chmod(0o644)
    with pytest.raises(UntrustedError, match="0644"):
        signer.sign(DIGEST)


def test_unreadable_keys_are_named(tmp_path: Path) -> None:
    signer = HomeSigner(tmp_path)
    signature = signer.sign(DIGEST)
    path = trust(tmp_path, b"nonsense")
    with pytest.raises(UntrustedError, match=r"friend\.pub"):
        signer.verify(DIGEST, signature)
    other = ec.generate_private_key(ec.SECP256R1()).public_key()
    path.write_bytes(other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    with pytest.raises(UntrustedError, match="another kind of key"):
        signer.verify(DIGEST, signature)
    path.unlink()
    (tmp_path / "keys/signing.key").write_bytes(b"")
    with pytest.raises(UntrustedError, match=r"signing\.key"):
        signer.sign(DIGEST)


def test_of_several_first_users_one_makes_the_key(tmp_path: Path) -> None:
    found: list[str] = []
    barrier = threading.Barrier(8)

    def use() -> None:
        barrier.wait()
        found.append(HomeSigner(tmp_path).key_id)

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
    assert (tmp_path / "keys/signing.pub").read_bytes() == HomeSigner(tmp_path).public_key()
