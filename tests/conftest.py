"""How the suite is run: temporary folders in memory, and what a module's fixture starts is started once."""

from __future__ import annotations

import os
import ssl
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any

import httpx
import psutil
import pytest
from argon2 import PasswordHasher

MEMORY_FOLDER = "/dev/shm"
FREE_BYTES = 8 << 30  # a whole run leaves one or two GB, and pytest keeps the last three
DAY = "MILLRACE_TEST_DAY"  # set once, so that all processes of a run choose the same
# files that take long: of their tests that are not marked `rotating`, one in so many runs on one day
ALTERNATING = {
    "api/mlflow/test_mlflow_clients.py": 2, "api/mlflow/test_mlflow_import_servers.py": 2,
    "api/pages/test_browser.py": 2, "api/test_endpoints.py": 2, "api/test_faults.py": 2, "api/test_leader.py": 2,
    "api/test_network.py": 2, "api/test_proxies.py": 2, "api/test_replicas.py": 2, "api/test_rollout.py": 2, "api/test_up.py": 2,
    "api/test_workers.py": 3, "cli/test_login.py": 2, "cli/test_two_terminals.py": 2, "compress/test_recipes.py": 2,
    "control/test_backup.py": 2, "control/test_dossier.py": 2, "control/test_gc.py": 2, "data/test_fuzz.py": 2,
    "e2e/test_canaries.py": 2, "e2e/test_own_model.py": 2, "e2e/test_stories.py": 2, "house/test_wheel.py": 2,
    "security/test_attacks_inputs.py": 2, "security/test_attacks_texts.py": 2, "security/test_attacks_web.py": 2,
    "security/test_oidc_providers.py": 2, "stats/test_drift_real_rows.py": 2, "stats/test_drift_simulation.py": 2,
    "stats/test_paired_bounds.py": 2, "store/test_backup_store.py": 2, "store/test_blobs_encrypted.py": 2,
    "store/test_blobs_faults.py": 2, "store/test_blobs_radosgw.py": 2, "store/test_blobs_remote.py": 2,
    "store/test_processes.py": 2, "store/test_tracking_search.py": 2, "train/test_export.py": 2,
}  # fmt: skip


def pytest_configure() -> None:
    """Put temporary folders into memory where there is room: thousands of fsyncs wait for the disk otherwise.

    TMPDIR chooses another place, for example a real disk.
    """
    httpx._transports.default.create_ssl_context = shared_ssl_context  # type: ignore[attr-defined]
    os.environ.setdefault(DAY, str(datetime.now(UTC).toordinal()))
    if "TMPDIR" in os.environ or not os.access(MEMORY_FOLDER, os.W_OK):
        return
    place = os.statvfs(MEMORY_FOLDER)
    free = min(place.f_bavail * place.f_frsize, psutil.virtual_memory().available)
    if free >= FREE_BYTES and not place.f_flag & os.ST_NOEXEC:  # tests start programs that they have written
        tempfile.tempdir = os.environ["TMPDIR"] = MEMORY_FOLDER


@cache
def _public_authorities(file: str | None) -> ssl.SSLContext:
    return httpx.create_ssl_context()


def shared_ssl_context(verify: Any = True, cert: Any = None, trust_env: bool = True) -> ssl.SSLContext:
    """As httpx makes it, but the public authorities' certificates are opened once: 30 ms for each client otherwise."""
    if verify is True and cert is None:
        return _public_authorities(os.environ.get("SSL_CERT_FILE") if trust_env else None)
    return httpx.create_ssl_context(verify, cert, trust_env)


def shared_by_a_module(item: pytest.Item) -> str:
    """The name of a test's group: its module and the parameters of the module's fixtures; empty if it uses none."""
    if not isinstance(item, pytest.Function):
        return ""
    shared = [name for name, found in item._fixtureinfo.name2fixturedefs.items() if found[-1].scope == "module"]
    indices = item.callspec.indices if hasattr(item, "callspec") else {}
    chosen = [f"{name}{indices[name]}" for name in sorted(shared) if name in indices]
    return "-".join([item.nodeid.partition("::")[0], *chosen]) if shared else ""


def rotate(items: list[pytest.Item], day: int) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """Which tests run on a day, and which on others.

    Of a test that is marked `rotating(n)` n of its parameters run, of tests marked `rotating(n, "name")` n of them all,
    of the others in a file of `ALTERNATING` one in so many.
    """
    seen: dict[str, int] = defaultdict(int)
    absent: set[pytest.Item] = set()
    groups: dict[str, list[pytest.Item]] = defaultdict(list)
    counts: dict[str, int] = {}
    for item in items:
        if (mark := item.get_closest_marker("rotating")) is not None:
            name = mark.args[1] if len(mark.args) > 1 else item.nodeid.partition("[")[0]
            groups[name].append(item)
            counts[name] = mark.args[0]
        elif (share := ALTERNATING.get(file := item.nodeid.partition("::")[0].removeprefix("tests/"))) is not None:
            if (seen[file] + day) % share:
                absent.add(item)
            seen[file] += 1
    for name, group in groups.items():
        count = counts[name]
        first = day * count % len(group)
        absent |= {item for place, item in enumerate(group) if (place - first) % len(group) >= count}
    return [item for item in items if item not in absent], [item for item in items if item in absent]


def pytest_report_header() -> str:
    """Which part of the rotating tests this is."""
    return f"rotating tests of day {os.environ[DAY]} ({DAY} chooses another, MILLRACE_ALL_TESTS=1 all of them)"


def tell_xdist(item: pytest.Item) -> None:
    """xdist 3.8 writes the group where pytest 9.2 no longer looks: https://github.com/pytest-dev/pytest-xdist/issues/1386"""
    groups = sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")})
    if groups and hasattr(item, "_id"):
        item._id = type(item._id).parse(f"{item.nodeid}@{'_'.join(groups)}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Give every test that needs one its group, so that with -n it runs in the process of those it shares with."""
    if not os.environ.get("MILLRACE_ALL_TESTS"):
        items[:], others = rotate(items, int(os.environ[DAY]))
        config.hook.pytest_deselected(items=others)
    for item in items:
        if item.get_closest_marker("xdist_group") is None and (group := shared_by_a_module(item)):
            item.add_marker(pytest.mark.xdist_group(group))
    yield
    if getattr(config.option, "loadgroup", False):
        for item in items:
            tell_xdist(item)


@pytest.fixture(scope="session")
def quick_hashing() -> PasswordHasher:
    """What costs next to nothing."""
    return PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)


@pytest.fixture
def quick_passwords(monkeypatch: pytest.MonkeyPatch, quick_hashing: PasswordHasher) -> None:
    """For tests of what passwords open, not of how they are kept."""
    monkeypatch.setattr("millrace.security.passwords._HASHER", quick_hashing)
    monkeypatch.setattr("millrace.security.passwords._nobodys", lambda: quick_hashing.hash("nobody"))
