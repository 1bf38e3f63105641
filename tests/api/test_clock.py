"""The clock of a running server jumps, ahead and back: a library under every process moves it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from millrace.client.http import HttpTransport
from millrace.security.chain import verify
from millrace.store.records_sql import open_records
from millrace.testing.server import RunningServer

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C compiler")
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static time_t offset(void) {  /* read anew each time: it may have been moved */
  char text[32];
  const char *path = getenv("CLOCK_OFFSET_FILE");
  int file = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
  if (file < 0) return 0;
  ssize_t size = read(file, text, sizeof text - 1);
  close(file);
  text[size > 0 ? size : 0] = 0;
  return atol(text);
}
int clock_gettime(clockid_t clock, struct timespec *at) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(clock, at);
  if (code == 0 && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) at->tv_sec += offset();
  return code;
}
int gettimeofday(struct timeval *at, void *zone) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  at->tv_sec = now.tv_sec;
  at->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *at) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (at) *at = now.tv_sec;
  return now.tv_sec;
}
"""
SPEC = """project: own
steps:
  - {name: slow, uses: "own.py:slow"}
  - {name: last, uses: "own.py:last", needs: [slow]}
"""
OWN = """import os, pathlib, time
def slow(ctx):
    mark = pathlib.Path(os.environ["MARKS"])
    (mark / f"began-{os.getpid()}").write_text(str(time.time()))
    while not (mark / "go").exists():
        time.sleep(0.05)
def last(ctx):
    return {"at": time.time()}
"""
DAY_S = 86_400


def until(check: Callable[[], object], what: str, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_clock_that_jumps_changes_no_owner_and_loses_nothing(tmp_path: Path) -> None:
    offset = tmp_path / "offset"

    def jump(days: int) -> None:
        new = offset.with_suffix(".new")
        new.write_text(f"{days * DAY_S:+d}")
        new.replace(offset)

    assert COMPILER is not None
    (tmp_path / "shim.c").write_text(SHIM)
    library = str(tmp_path / "shim.so")
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, str(tmp_path / "shim.c"), "-ldl"], check=True)
    jump(0)
    environment = {
        "LD_PRELOAD": library, "CLOCK_OFFSET_FILE": str(offset), "MARKS": str(tmp_path),
        "MILLRACE_HEARTBEAT_TIMEOUT_S": "5",
    }  # fmt: skip
    work = tmp_path / "work"
    work.mkdir()
    (work / "millrace.yaml").write_text(SPEC)
    (work / "own.py").write_text(OWN)
    with RunningServer(work / ".millrace", environment=environment) as server:
        client = HttpTransport(server.url)

        def sealed() -> int:
            events = client.call("event.list", {"limit": 1000})
            return events[-1].seq if events else 0

        def is_led() -> None:
            """Somebody still seals: what is written now is an event soon."""
            before = sealed()
            client.call("project.create", {"name": f"p{before}"})
            until(lambda: sealed() > before, "an event is sealed")

        subprocess.run(
            [sys.executable, "-m", "millrace", "run", "--detach"], cwd=work, check=True, capture_output=True,
            env={**os.environ, **environment},
        )  # fmt: skip
        until(lambda: list(tmp_path.glob("began-*")), "the step begins")
        run = client.call("run.list", {})[0]
        for days in (2, -1, 30, 0):
            jump(days)
            is_led()
            assert client.call("run.get", {"run": run.id}).run.state == "running"
        jump(5)
        (tmp_path / "go").touch()
        until(lambda: client.call("run.get", {"run": run.id}).run.state == "succeeded", "the run ends")
        view = client.call("run.get", {"run": run.id})
        assert [step.attempt for step in view.steps] == [1, 1]
        assert len(list(tmp_path.glob("began-*"))) == 1, "no step ran twice"
        assert next(step for step in view.steps if step.name == "last").facts["at"] > time.time() + 4 * DAY_S
        is_led()
        client.close()
        assert server.log.read_text().count("this process leads") == 1, "no other leader was needed"
    records = open_records(work / ".millrace" / "records.db")
    try:
        links = list(records.links())
        assert verify(links, head=records.head()).broken is None
    finally:
        records.close()
