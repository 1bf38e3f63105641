"""How the suite is run: temporary folders in memory, and what a module's fixture starts is started once."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator

import psutil
import pytest

MEMORY_FOLDER = "/dev/shm"
FREE_BYTES = 8 << 30  # a whole run leaves one or two GB, and pytest keeps the last three


def pytest_configure() -> None:
    """Put temporary folders into memory where there is room: thousands of fsyncs wait for the disk otherwise.

    TMPDIR chooses another place, for example a real disk.
    """
    if "TMPDIR" in os.environ or not os.access(MEMORY_FOLDER, os.W_OK):
        return
    place = os.statvfs(MEMORY_FOLDER)
    free = min(place.f_bavail * place.f_frsize, psutil.virtual_memory().available)
    if free >= FREE_BYTES and not place.f_flag & os.ST_NOEXEC:  # tests start programs that they have written
        tempfile.tempdir = os.environ["TMPDIR"] = MEMORY_FOLDER


def shared_by_a_module(item: pytest.Item) -> str:
    """The name of a test's group: its module and the parameters of the module's fixtures; empty if it uses none."""
    if not isinstance(item, pytest.Function):
        return ""
    shared = [name for name, found in item._fixtureinfo.name2fixturedefs.items() if found[-1].scope == "module"]
    indices = item.callspec.indices if hasattr(item, "callspec") else {}
    chosen = [f"{name}{indices[name]}" for name in sorted(shared) if name in indices]
    return "-".join([item.nodeid.partition("::")[0], *chosen]) if shared else ""


def tell_xdist(item: pytest.Item) -> None:
    """xdist 3.8 writes the group where pytest 9.2 no longer looks: https://github.com/pytest-dev/pytest-xdist/issues/1386"""
    groups = sorted({str(mark.args[0]) for mark in item.iter_markers("xdist_group")})
    if groups and hasattr(item, "_id"):
        item._id = type(item._id).parse(f"{item.nodeid}@{'_'.join(groups)}")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Give every test that needs one its group, so that with -n it runs in the process of those it shares with."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None and (group := shared_by_a_module(item)):
            item.add_marker(pytest.mark.xdist_group(group))
    yield
    if getattr(config.option, "loadgroup", False):
        for item in items:
            tell_xdist(item)
