"""What some blob stores can do besides the port `Blobs`: sign URLs, tell ages."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import msgspec

from millrace.core.types import Artifact

MAX_PRESIGNED_BYTES = 5 << 30  # S3's bound of one PUT and of one copy


class PresignedUrl(msgspec.Struct, frozen=True, kw_only=True):
    """A request that anybody may make until it expires: a secret, not for logs."""

    method: str
    url: str
    headers: dict[str, str]
    expires_at: float


@runtime_checkable
class SupportsPresign(Protocol):
    """Blobs whose bytes may travel without passing through this process."""

    @property
    def can_presign(self) -> bool:
        """Whether this store is one of them."""
        ...

    def presign_put(self, digest: str, size: int, expires_s: float) -> PresignedUrl:
        """Where to send the bytes; they count only after `confirm`."""
        ...

    def presign_get(self, digest: str, expires_s: float) -> PresignedUrl:
        """Where to fetch the bytes; the receiver compares the digest."""
        ...

    def confirm(self, digest: str, size: int) -> Artifact:
        """Verify what was sent and make it a blob.

        Raises:
            NotFoundError: Nothing was sent.
            CorruptError: Something else was sent; it is removed.
        """
        ...


@runtime_checkable
class SupportsAge(Protocol):
    """Blobs that garbage collection may ask for their age."""

    def modified_at(self, digest: str) -> float:
        """When it was last put or touched, in seconds since 1970."""
        ...

    def touch(self, digest: str) -> None:
        """Make it count as new."""
        ...
