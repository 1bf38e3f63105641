"""Secrets: sealed by the keyring in the records, opened for the steps that name them, and for nothing else.

A secret's number is the second of its last change, or one more than the last: one that was deleted and set again has
another one, so that no step takes what was made with the old value for what the new one would make.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec

from millrace.control.dispatch import handles
from millrace.control.keys import kek_of, keyring_of, secret_context
from millrace.control.services import Services
from millrace.core.errors import InputError, MillraceError, NotFoundError
from millrace.core.operations import secrets as ops
from millrace.core.ports import Records
from millrace.core.spec import Spec
from millrace.core.types import Secret
from millrace.security.keyring import Keyring

SHORTEST, LARGEST = 6, 16 << 10  # characters, bytes: shorter ones could not be told from other text in a log
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_TAKEN = re.compile(
    r"(?:MILLRACE|PYTHON|LD|DYLD|OMP|MKL|CUDA)_?\w*|PATH|HOME|USER|SHELL|IFS|PWD|ENV|BASH_ENV|TMPDIR",
    re.IGNORECASE,
)


@handles(ops.LIST_SECRETS)
def list_secrets(services: Services, body: ops.SecretList) -> list[ops.SecretView]:
    """By project and name."""
    if not services.is_used:
        return []
    where = {"project": body.in_project} if body.in_project else None
    found = services.records.find(Secret, where, order="id", limit=body.limit, offset=body.offset)
    return [_view(secret) for secret in found]


@handles(ops.SET_SECRET)
def set_secret(services: Services, body: ops.SecretSet) -> ops.SecretView:
    """Keep a value, in place of another one.

    Raises:
        InputError: The name or the value is not one.
    """
    return _keep(services, body, must_exist=False)


@handles(ops.ROTATE_SECRET)
def rotate_secret(services: Services, body: ops.SecretSet) -> ops.SecretView:
    """Another value for a secret that is there.

    Raises:
        NotFoundError: There is no such secret.
    """
    return _keep(services, body, must_exist=True)


@handles(ops.DELETE_SECRET)
def delete_secret(services: Services, body: ops.SecretName) -> ops.SecretView:
    """Forget it; steps that name it do not run any more."""
    with services.records.transaction() as transaction:
        secret = transaction.get(Secret, f"{body.in_project}/{body.name}")
        if secret is None:
            raise _missing(body.name, body.in_project)
        transaction.delete(Secret, secret.id)
    return _view(secret)


def names_of(spec: Spec, step: str, stage: str) -> tuple[str, ...]:
    """The secrets that a spec names for a step.

    Args:
        spec: The spec.
        step: The step's name; of a matrix with its number.
        stage: `user`, or which stage it is.
    """
    if stage == "data":
        return tuple(spec.data.secrets) if spec.data is not None else ()
    if stage != "user":
        return ()
    own = next((one for one in spec.steps if step == one.name and not one.matrix), None)
    base = own or next((one for one in spec.steps if one.matrix and step.rpartition("-")[0] == one.name), None)
    return tuple(base.secrets) if base is not None else ()


def key_parts(services: Services, project: str, names: Iterable[str]) -> dict[str, str]:
    """What secrets add to a step's cache key: their numbers, never anything of their values.

    Raises:
        NotFoundError: The project has no such secret.
    """
    return {f"secret {name}": str(_find(services, project, name).number) for name in names}


def open_values(services: Services, project: str, names: Iterable[str]) -> dict[str, str]:
    """Values by name.

    Raises:
        NotFoundError: The project has no such secret.
        CorruptError: It was altered in the records.
    """
    return {name: _open(services, _find(services, project, name)) for name in names}


def values_at_hand(services: Services, project: str, names: Iterable[str]) -> dict[str, str]:
    """The same without those that are gone: the step that asks for one is told so."""
    found = {}
    for name in names:
        try:
            found |= open_values(services, project, [name])
        except MillraceError:
            continue
    return found


def _open(services: Services, secret: Secret) -> str:
    return keyring_of(services).unseal(secret.sealed, secret_context(secret)).decode()


def _find(services: Services, project: str, name: str) -> Secret:
    secret = services.records.get(Secret, f"{project}/{name}")
    if secret is None:
        raise _missing(name, project)
    return secret


def _keep(services: Services, body: ops.SecretSet, *, must_exist: bool) -> ops.SecretView:
    _check(body)
    ring, id = keyring_of(services), f"{body.in_project}/{body.name}"
    now = services.clock.now()
    with services.records.transaction() as transaction:
        old = transaction.get(Secret, id)
        if old is None and must_exist:
            raise _missing(body.name, body.in_project)
        _check_keys(ring, services.all_records)
        new = Secret(
            id=id, project=body.in_project, name=body.name, sealed="", changed_at=now,
            number=max(int(now), old.number + 1 if old else 1), created_at=old.created_at if old else now,
        )  # fmt: skip
        new = msgspec.structs.replace(new, sealed=ring.seal(body.value.encode(), secret_context(new)))
        transaction.put(new, old.version if old else 0)
    return _view(new)


def _check_keys(ring: Keyring, records: Records) -> None:
    """Refuse to seal by a key of one's own what other hosts on these records, who have another, could not open.

    Raises:
        NotFoundError: Something is sealed by a key that is not here.
    """
    for kek in {kek_of(secret) for secret in records.find(Secret)}:
        try:
            ring.check_has(kek)
        except NotFoundError as error:
            raise NotFoundError(
                f"nothing is kept: secrets here are sealed by {kek}, which is not among the keys of this home",
                hint="let encryption_key name the same keys on every host; `millrace secrets delete` what no key opens",
            ) from error


def _check(body: ops.SecretSet) -> None:
    """Refuse names that would change how a process starts, and values that cannot be hidden or handed over."""
    if not _NAME.fullmatch(body.name) or _TAKEN.fullmatch(body.name):
        raise InputError(
            f"a secret's name has letters, digits and _, and is no variable that programs obey; got {body.name[:80]!r}",
            hint="for example DB_PASSWORD",
        )
    if not body.in_project or "/" in body.in_project:
        raise InputError(f"want the key of a project, got {body.in_project[:80]!r}")
    size = len(body.value.encode(errors="surrogatepass"))
    if len(body.value.strip()) < SHORTEST or size > LARGEST or "\0" in body.value or not _is_text(body.value):
        raise InputError(f"a secret's value has {SHORTEST} characters to {LARGEST} bytes of text, without NUL")


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _missing(name: str, project: str) -> NotFoundError:
    return NotFoundError(
        f"the project {project!r} has no secret {name[:80]!r}",
        hint=f"`millrace secrets set {name[:80]} --in-project {project}`",
    )


def _view(secret: Secret) -> ops.SecretView:
    return ops.SecretView(
        name=secret.name, project=secret.project, number=secret.number, changed_at=secret.changed_at
    )  # fmt: skip
