"""LocalBlobs tells ages as every store does; old blobs that are put again are young."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from millrace.core.errors import CorruptError
from millrace.store.blobs_local import LocalBlobs
from millrace.testing.blobs import BlobAgeConformance, BlobDiscardConformance


class TestLocalAge(BlobAgeConformance, BlobDiscardConformance):
    """The suite."""

    @pytest.fixture
    def blobs(self, tmp_path: Path) -> LocalBlobs:
        return LocalBlobs(tmp_path / "store")


def test_an_old_blob(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    digest = blobs.put(b"x").digest
    os.utime(blobs.path(digest), (1000, 1000))
    assert blobs.modified_at(digest) == 1000
    blobs.put(b"x")
    assert blobs.modified_at(digest) > 1000


def test_a_touch_forgives_no_damage(tmp_path: Path) -> None:
    """A blob that changed behind our back is not taken for verified because it was touched since."""
    blobs = LocalBlobs(tmp_path)
    file = blobs.path(blobs.put(b"some bytes").digest)
    file.chmod(0o644)
    file.write_bytes(b"SOME BYTES")
    blobs.touch("sha256:" + file.parent.name + file.name)
    with pytest.raises(CorruptError, match="damaged"):
        blobs.path("sha256:" + file.parent.name + file.name)
