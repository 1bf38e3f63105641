"""An object store by URL: how it is opened, what may be said of its errors, when one gives up."""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import msgspec
from obstore import exceptions
from obstore.store import from_url

from millrace.core.errors import DeniedError, InputError, MillraceError, NotFoundError, QuotaError, UnavailableError

SCHEMES = ("s3", "gs", "az", "memory", "file")
MIN_PART_BYTES = 5 << 20  # S3 refuses smaller parts
_ENDPOINT_KEYS = frozenset({"endpoint", "endpoint_url", "endpoint_url_s3"})
_STATUS = re.compile(r"status code: (\d{3})")
_CODE = re.compile(r"<Code>([A-Za-z0-9]{1,60})</Code>")
_DENIED_CODES = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_NO_BUCKET = ("NoSuchBucket", "ContainerNotFound", "The specified bucket does not exist")
_METADATA_HOST = "169.254.169.254"
_CREDENTIALS_HINT = (
    "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the policy of that key "
    "(GOOGLE_APPLICATION_CREDENTIALS for gs://, AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY for az://)"
)


class _Runtime:
    """Whether the client's threads run here: a fork of their process has none, and would wait for ever."""

    is_used = False
    is_lost = False

    @classmethod
    def after_fork(cls) -> None:
        """In the child."""
        cls.is_lost = cls.is_used


os.register_at_fork(after_in_child=_Runtime.after_fork)


class RemoteOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach an object store and what may be kept of it here.

    Attributes:
        config: What the store's client takes (`endpoint`, `region`, `access_key_id`, …); it goes before the
            standard environment variables (`AWS_*`, `GOOGLE_*`, `AZURE_*`) and is never shown.
        cache_bytes: Bound of the local cache.
        part_bytes: Size of an upload's part and of a large read; blobs up to it are stored by one request.
        parts_at_once: Parts in flight for one blob; memory is about this times `part_bytes`.
        deadline_s: A request is not tried again after so many seconds.
        request_timeout_s: One try of one request.
        max_retries: Tries after the first.
        allow_http: Permit plain HTTP to a host that is not this one; `AWS_ALLOW_HTTP=true` does so too.

    Example:
        >>> RemoteOptions(config={"secret_access_key": "x"})
        RemoteOptions(config={'secret_access_key': '…'}, cache_bytes=10737418240)
    """

    config: dict[str, str] = {}
    cache_bytes: int = 10 << 30
    part_bytes: int = 8 << 20
    parts_at_once: int = 4
    deadline_s: float = 60.0
    request_timeout_s: float = 30.0
    max_retries: int = 10
    allow_http: bool = False

    def __repr__(self) -> str:
        """Without the values of `config`: some are secrets."""
        hidden = {key: "…" for key in self.config}
        return f"RemoteOptions(config={hidden}, cache_bytes={self.cache_bytes})"


def open_store(url: str, options: RemoteOptions, environ: Mapping[str, str] | None = None) -> Any:
    """The client of an object store; no request is made.

    Args:
        url: `s3://bucket/prefix`, `gs://…`, `az://container/prefix`, `memory:///` or `file:///folder`.
        options: Configuration and bounds.
        environ: The environment; `os.environ` when absent.

    Raises:
        InputError: The URL or a key of the configuration is not understood, or credentials would go over plain
            HTTP to another host.
    """
    scheme = check_url(url)
    if options.part_bytes < MIN_PART_BYTES:
        raise InputError(f"part_bytes must be at least {MIN_PART_BYTES}, got {options.part_bytes}")
    if scheme in ("memory", "file"):
        return from_url(url, mkdir=True) if scheme == "file" else from_url(url)
    environ = os.environ if environ is None else environ
    try:
        return from_url(
            url,
            config=dict(options.config),  # type: ignore[arg-type]
            client_options={
                "allow_http": _may_use_http(options, environ),
                "timeout": timedelta(seconds=options.request_timeout_s),
                "connect_timeout": timedelta(seconds=min(5.0, options.request_timeout_s)),
            },
            retry_config={
                "max_retries": options.max_retries,
                "retry_timeout": timedelta(seconds=options.deadline_s),
                "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=5)},
            },
        )
    except exceptions.UnknownConfigurationKeyError:
        raise InputError(
            f"a key of the configuration of {url} is not known: {', '.join(sorted(options.config))}"
        ) from None
    except exceptions.BaseError as error:
        raise InputError(f"cannot open {url}: {_first_line(error, options)}") from None


def check_url(url: str) -> str:
    """The scheme of a store's URL.

    Raises:
        InputError: It is not one of ours, or holds credentials (URLs are shown and logged).

    Example:
        >>> check_url("s3://bucket/prefix")
        's3'
        >>> check_url("s3://key:secret@bucket")
        Traceback (most recent call last):
        ...
        millrace.core.errors.InputError: the URL of a blob store must not hold credentials or a query
    """
    parts = urlsplit(url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise InputError("the URL of a blob store must not hold credentials or a query", hint=_CREDENTIALS_HINT)
    if parts.scheme not in SCHEMES:
        raise InputError(f"want the URL of a blob store ({', '.join(SCHEMES)}), got {url!r}")
    if parts.scheme in ("s3", "gs", "az") and not parts.netloc:
        raise InputError(f"the URL {url!r} names no bucket", hint=f"want {parts.scheme}://bucket/prefix")
    return parts.scheme


def _may_use_http(options: RemoteOptions, environ: Mapping[str, str]) -> bool:
    named = {key.lower().removeprefix("aws_").removeprefix("azure_"): value for key, value in options.config.items()}
    endpoints = [value for key, value in named.items() if key in _ENDPOINT_KEYS]
    endpoints += [value for key, value in environ.items() if key.lower().removeprefix("aws_") in _ENDPOINT_KEYS]
    plain = [urlsplit(value).hostname or "" for value in endpoints if value.startswith("http://")]
    is_allowed = options.allow_http or environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
    for host in plain:
        if not is_allowed and not _is_loopback(host):
            raise InputError(
                f"the endpoint at {host} is plain HTTP: what is stored could be read and changed on the way",
                hint="use https://, or set AWS_ALLOW_HTTP=true if the network itself is trusted",
            )
    return bool(plain) or is_allowed


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """A store's errors as ours. Their own text may hold key ids and signatures: none of it is passed on.

    An absent object stays `FileNotFoundError`, an existing one `AlreadyExistsError`: callers know what they mean.

    Raises:
        NotFoundError: The bucket does not exist.
        DeniedError: The store refuses the credentials, or there are none.
        QuotaError: The store says that its quota is used up.
        UnavailableError: Not reachable, failing or too slow, after all tries; or this is a fork of a process that
            has used a store.
    """
    if _Runtime.is_lost:
        raise UnavailableError(
            f"{url} cannot be reached from a fork of a process that has used it", hint="start the process with spawn"
        )
    _Runtime.is_used = True
    try:
        yield
    except FileNotFoundError as error:
        if any(sign in str(error) for sign in _NO_BUCKET):
            raise no_bucket(url) from None
        raise
    except exceptions.AlreadyExistsError:
        raise
    except exceptions.BaseError as error:
        raise _translated(error, url) from None


def no_bucket(url: str) -> NotFoundError:
    """The refusal of a store whose bucket does not exist."""
    return NotFoundError(
        f"the bucket of {url} does not exist", hint="create it, or correct the URL, the endpoint or the region"
    )


def _translated(error: exceptions.BaseError, url: str) -> MillraceError:
    text = str(error)
    status, code = _found(_STATUS, text), _found(_CODE, text)
    if any(sign in text for sign in _NO_BUCKET):
        return no_bucket(url)
    if code == "QuotaExceeded":
        return QuotaError(f"{url}: the quota of the store is used up")
    if _METADATA_HOST in text:
        return DeniedError(f"{url}: there are no credentials for this store", hint=_CREDENTIALS_HINT)
    refused = isinstance(error, (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError))
    if refused or status in ("401", "403") or code in _DENIED_CODES:
        return DeniedError(f"{url}: the store refuses these credentials ({code or status or 'denied'})",
                           hint=_CREDENTIALS_HINT)  # fmt: skip
    if isinstance(error, exceptions.NotSupportedError):
        return InputError(f"{url}: the store does not support this")
    return UnavailableError(f"{url}: the store {_reason(text, status, code)}, also after trying again")


def _reason(text: str, status: str, code: str) -> str:
    if status:
        return f"answers {status}{' ' + code if code else ''}"
    if "Timeout" in text or "TimedOut" in text:
        return "does not answer in time"
    return "breaks off or cannot be reached"


def _found(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else ""


def _first_line(error: exceptions.BaseError, options: RemoteOptions) -> str:
    """The client's own complaint about a configuration, unless it repeats one of its values."""
    line = str(error).partition("\n")[0]
    return (
        "the configuration is not valid" if any(value and value in line for value in options.config.values()) else line
    )
