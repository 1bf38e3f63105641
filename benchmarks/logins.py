"""What 64 people who sign in at once cost a server, and those who use it meanwhile.

Run: `python benchmarks/logins.py`. A server that wants tokens, one API process. `run.get` with a token, one call after
another, is timed alone and while another process sends 64 sign-ins at once, again and again, each with the right
password. Memory is that of the server's process tree (proportional set size), at its highest. Aims: at most 250 MB
more, and p99 of the calls at most twice what it is alone.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from millrace.client.http import HttpTransport

AT_ONCE, ROUNDS, CALLS = 64, 6, 2000
PASSWORD = "blue tractor on mars"
ROOT = Path(__file__).resolve().parents[1]


async def flood(url: str) -> None:
    """All people sign in at once, some times; prints how it went."""
    took: list[float] = []
    statuses: dict[int, int] = {}

    async def sign_in(number: int, limits: httpx.Limits) -> None:
        async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
            page = await client.get("/login")
            found = re.search(r'name="form" value="([^"]*)"', page.text)
            assert found
            began = time.perf_counter()
            data = {"form": found[1], "name": f"user-{number}", "password": PASSWORD}
            answer = await client.post("/login", data=data)
            took.append(time.perf_counter() - began)
            statuses[answer.status_code] = statuses.get(answer.status_code, 0) + 1

    for _ in range(ROUNDS):
        await asyncio.gather(*(sign_in(number, httpx.Limits(max_connections=1)) for number in range(AT_ONCE)))
    print(f"{'answers':48} {statuses}")
    print(f"{'a sign-in, p50 and most':48} {statistics.median(took):6.2f} s {max(took):6.2f} s")


def memory_mb(pid: int) -> float:
    """Proportional set size of a process and all below it."""
    total, waiting = 0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            rolled = Path(f"/proc/{one}/smaps_rollup").read_text()
            children = Path(f"/proc/{one}/task/{one}/children").read_text()
        except OSError:
            continue
        found = re.search(r"^Pss:\s+(\d+)", rolled, re.MULTILINE)
        total += int(found[1]) if found else 0
        waiting += map(int, children.split())
    return total / 1024


def p99_ms(transport: HttpTransport, run: str, is_over: threading.Event | None = None) -> tuple[float, float, int]:
    """The median and the 99th percentile of calls, and how many there were."""
    taken: list[float] = []
    while len(taken) < CALLS if is_over is None else not is_over.is_set():
        began = time.perf_counter()
        transport.call("run.get", {"run": run})
        taken.append((time.perf_counter() - began) * 1e3)
        time.sleep(0.002)
    taken.sort()
    return statistics.median(taken), taken[int(len(taken) * 0.99)], len(taken)


def measure(url: str, secret: str, pid: int) -> None:
    """Alone, then in the flood."""
    transport = HttpTransport(url, token=secret)
    for number in range(AT_ONCE):
        transport.call("user.create", {"name": f"user-{number}", "password": PASSWORD})
    run = transport.call("run.track", {"name": "x"}).id
    alone = p99_ms(transport, run)
    before, most = memory_mb(pid), 0.0
    process = subprocess.Popen([sys.executable, __file__, url])
    is_over = threading.Event()
    told: list[tuple[float, float, int]] = []
    caller = threading.Thread(target=lambda: told.append(p99_ms(transport, run, is_over)))
    caller.start()
    while process.poll() is None:
        most = max(most, memory_mb(pid))
        time.sleep(0.05)
    is_over.set()
    caller.join()
    transport.close()
    (busy,) = told
    print(f"{'run.get alone, p50 and p99':48} {alone[0]:6.2f} ms {alone[1]:6.2f} ms")
    print(f"{f'run.get meanwhile ({busy[2]} calls)':48} {busy[0]:6.2f} ms {busy[1]:6.2f} ms")
    print(f"{'p99 meanwhile / alone (aim: at most 2)':48} {busy[1] / alone[1]:6.2f}")
    print(f"{'memory before, and most':48} {before:6.0f} MB {most:6.0f} MB")
    print(f"{'more (aim: at most 250 MB)':48} {most - before:6.0f} MB")


def main() -> None:
    """A server of its own for it."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "millrace", "--home", f"{folder}/home", "up", "--port", "0"]
        # It asks for tokens, and answers this machine, which is all that is wanted here.
        command += ["--tls-terminated-by-proxy", "192.0.2.1", "--name", "bench.example.org"]
        with log.open("w") as out:
            server = subprocess.Popen(command, cwd=folder, stdout=out, stderr=out, env={**os.environ})
        try:
            deadline = time.monotonic() + 60
            while " ready " not in log.read_text() and time.monotonic() < deadline:
                time.sleep(0.1)
            text = log.read_text()
            secret, url = re.search(r" owner +(\S+)", text), re.search(r" ready +(\S+)", text)
            assert secret, text
            assert url, text
            measure(url[1], secret[1], server.pid)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(30)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        asyncio.run(flood(sys.argv[1]))
    else:
        main()
