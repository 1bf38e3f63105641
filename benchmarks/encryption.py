"""What encryption costs: writing and reading a blob of 256 MiB, encrypted against plain.

.venv/bin/python benchmarks/encryption.py [MIB]

Pairs in one run, in turn, so that both meet the same disk (a folder of the working directory; MILLRACE_BENCH_DIR for
another one). Writing is `put` of a file, durable; reading is `open` from start to end in parts of 1 MiB, verified. Aim:
encrypted is at least 0.6 of plain, at the median of the pairs.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from millrace.core.ports import Blobs
from millrace.security.keyring import Keyring
from millrace.store.blobs_encrypted import EncryptedBlobs
from millrace.store.blobs_local import LocalBlobs
from millrace.store.records_sql import open_records

PAIRS = 7
AIM = 0.6


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def read_all(blobs: Blobs, digest: str) -> None:
    """From start to end."""
    with blobs.open(digest) as file:
        while file.read(1 << 20):
            continue


def main() -> int:
    """Print the table; 1 when an aim is missed."""
    size = int(sys.argv[1] if len(sys.argv) > 1 else 256) << 20
    with tempfile.TemporaryDirectory(dir=os.environ.get("MILLRACE_BENCH_DIR", ".")) as folder:
        home = Path(folder)
        records = open_records(home / "records.db")
        plain = LocalBlobs(home / "plain")
        sealed = EncryptedBlobs(LocalBlobs(home / "sealed"), records, Keyring(home), home / "cache")
        source = home / "source"
        seconds: dict[str, list[float]] = {name: [] for name in ("plain write", "encrypted write", "plain read",
                                                                 "encrypted read")}  # fmt: skip
        for _ in range(PAIRS):
            source.write_bytes(os.urandom(size))
            os.sync()
            for name, blobs in (("plain", plain), ("encrypted", sealed)):
                seconds[f"{name} write"].append(timed(lambda blobs=blobs: blobs.put(source)))
                digest = next(iter(blobs.list())).digest
                seconds[f"{name} read"].append(timed(lambda blobs=blobs, digest=digest: read_all(blobs, digest)))
                blobs.delete(digest)
        records.close()
    missed = False
    for what in ("write", "read"):
        ratios = [
            one / other for one, other in zip(seconds[f"plain {what}"], seconds[f"encrypted {what}"], strict=True)
        ]
        speeds = [size / statistics.median(seconds[f"{name} {what}"]) / 1e6 for name in ("plain", "encrypted")]
        ratio = statistics.median(ratios)
        missed = missed or ratio < AIM
        print(
            f"{what:6} plain {speeds[0]:6.0f} MB/s   encrypted {speeds[1]:6.0f} MB/s   ratio {ratio:.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}, {PAIRS} pairs, aim {AIM})"
        )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
