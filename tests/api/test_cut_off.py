"""A server that is cut off while it is asked: whoever asks is told, and does not wait for ever."""

from __future__ import annotations

import subprocess
import sys

import pytest

from millrace.testing.namespaces import Hosts, can_make

pytestmark = [
    pytest.mark.root,
    pytest.mark.xdist_group("namespaces"),
    pytest.mark.skipif(not can_make(), reason="network namespaces need root and iproute2"),
]
SILENT = """
import socket
listener = socket.create_server(("10.77.0.1", 7070))
link, _ = listener.accept()
link.recv(1 << 16)
print("asked", flush=True)
link.recv(1)
"""
ASKS = """
import sys
from millrace.client import http
assert len(http.ALIVE) == 5, http.ALIVE
names = [option for _, option, _ in http.ALIVE]
times = dict(zip(names[1:], (1, 1, 2, 3000)))  # as documented, only sooner
http.ALIVE = [(level, option, times.get(option, value)) for level, option, value in http.ALIVE]
try:
    http.HttpTransport("http://10.77.0.1:7070").call("work.claim", {"worker": "x", "version": "1"})
except http.UnavailableError as error:
    print(error.code, error.message)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_who_asks_is_told_that_the_server_is_cut_off() -> None:
    with Hosts(2) as hosts:
        server = subprocess.Popen([*hosts.prefix(1), sys.executable, "-c", SILENT], stdout=subprocess.PIPE, text=True)
        client = subprocess.Popen([*hosts.prefix(2), sys.executable, "-c", ASKS], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            while server.stdout.readline() != "asked\n":
                assert server.poll() is None
            hosts.cut(1)
            said, _ = client.communicate(timeout=60)
            assert said.startswith("unavailable the server http://10.77.0.1:7070 cannot be reached: "), said
        finally:
            for process in (server, client):
                process.kill()
                process.wait()
            assert server.stdout is not None
            server.stdout.close()
