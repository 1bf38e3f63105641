"""Publishing signed heads: to a file that is appended to, or to a webhook. In order, and each at least once."""

from __future__ import annotations

import os
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import httpx
import msgspec

from millrace.control.services import Services
from millrace.core.addresses import may_be_called
from millrace.core.errors import InputError, UnavailableError
from millrace.core.ids import digest_bytes
from millrace.core.types import AuditHead
from millrace.store.records_sql import SqlRecords

AT_ONCE = 100  # in one round
_PAGE = 100
WEBHOOK_TIMEOUT_S = 5.0


def publish_pending(services: Services, records: SqlRecords, as_line: Callable[[AuditHead], bytes]) -> int:
    """Publish the heads that did not go to the place that the setting `audit_publish` names.

    Args:
        services: The home.
        records: Where heads are.
        as_line: How a head is written.

    Returns:
        How many.

    Raises:
        InputError: The setting is no place to publish to.
        UnavailableError: The place does not take them now: what it has not taken stays pending.
    """
    target = str(services.setting("audit_publish"))
    mark = digest_bytes(target.encode())[7:23]  # not the target itself: a webhook's URL may hold a secret
    pending = _pending(records, mark)[:AT_ONCE]
    if not target or not pending:
        return 0
    if "://" in target:
        send = _webhook(services, target)
        for head in pending:
            send(as_line(head))
            _note(records, head, mark)
    else:
        append_lines(services.home / target, [as_line(head) for head in pending])
        for head in pending:
            _note(records, head, mark)
    return len(pending)


def _pending(records: SqlRecords, mark: str) -> list[AuditHead]:
    """Heads after the last that went there, the smallest first."""
    found: list[AuditHead] = []
    while page := records.find(AuditHead, order="-size", limit=_PAGE, offset=len(found)):
        for head in page:
            if head.published == mark:
                return found[::-1]
            found.append(head)
    return found[::-1]


def _note(records: SqlRecords, head: AuditHead, mark: str) -> None:
    records.put(msgspec.structs.replace(head, published=mark), head.version)


def append_lines(path: Path, lines: list[bytes]) -> None:
    """Append lines durably; a line that was cut off before stays, and a new one begins after it.

    Raises:
        UnavailableError: The file cannot be written.
    """
    try:
        is_new = not path.exists()
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                lines = lines if file.read(1) == b"\n" else [b"", *lines]
            file.write(b"".join(line + b"\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())
        if is_new:
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise UnavailableError(f"{path}: {error.strerror}", hint="check the setting audit_publish") from error


def _webhook(services: Services, target: str) -> Callable[[bytes], None]:
    """What sends one head.

    The host is looked up once and that address is called: a name that means another address a moment later
    (DNS rebinding) gains nothing. Redirects are not followed.
    """
    is_local_allowed = bool(services.setting("audit_publish_local"))
    try:
        url = httpx.URL(target)
    except httpx.InvalidURL as error:
        raise InputError(f"the setting audit_publish is no URL: {error}") from None
    if url.scheme != "https" or not url.host:
        raise InputError(f"the setting audit_publish wants a file or an https:// URL, got {url.scheme}://…")
    address = public_address(url.host, url.port or 443, is_local_allowed)
    called = url.copy_with(host=address, userinfo=b"")
    headers = {"Host": url.netloc.decode().rpartition("@")[2], "Content-Type": "application/json"}
    auth = httpx.BasicAuth(url.username, url.password) if url.userinfo else None
    context = ssl.create_default_context(cafile=services.setting("ca_file") or None)

    def send(line: bytes) -> None:
        try:
            with (
                httpx.Client(verify=context, timeout=WEBHOOK_TIMEOUT_S, trust_env=False, auth=auth) as client,
                client.stream(  # its body is not read: it may have no end
                    "POST", called, content=line, headers=headers, extensions={"sni_hostname": url.host}
                ) as answer,
            ):
                status = answer.status_code
        except httpx.HTTPError as error:
            raise UnavailableError(f"the webhook at {url.host} cannot be reached: {error}") from None
        if not 200 <= status < 300:
            raise UnavailableError(f"the webhook at {url.host} answers {status}, want 2xx")

    return send


def public_address(host: str, port: int, is_local_allowed: bool) -> str:
    """An address of a host that a server may call on somebody's word.

    Raises:
        InputError: It is this machine's own, link-local (where clouds keep credentials), or none to call.
        UnavailableError: There is no such host now.

    Example:
        >>> public_address("127.0.0.1", 443, False)
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: the webhook's host 127.0.0.1 is at 127.0.0.1: not an address to call
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UnavailableError(f"the webhook's host {host} is not found: {error}") from None
    addresses = [str(one[4][0]) for one in found]
    refused = [one for one in addresses if not may_be_called(one, is_local_allowed=is_local_allowed)]
    if refused:
        raise InputError(
            f"the webhook's host {host} is at {refused[0]}: not an address to call",
            hint="if it is meant, allow it with the setting audit_publish_local: 1",
        )
    return addresses[0]
