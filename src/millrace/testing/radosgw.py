"""A real S3 service for tests: radosgw with one monitor and one in-memory store, as ordinary processes.

It checks signatures and conditional writes as a production service does. Debian and Ubuntu have it:
`apt-get install radosgw ceph-mon ceph-osd`.

Example:
    >>> missing_programs(("no-such-program",))
    ('no-such-program',)
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from millrace.core.errors import UnavailableError

PROGRAMS = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph-authtool", "monmaptool", "ceph")
START_TIMEOUT_S = 90.0
STEP_TIMEOUT_S = 60.0
_CONFIG = """\
[global]
fsid = {fsid}
mon_host = [v2:127.0.0.1:{mon_port}/0]
mon_initial_members = a
public_addr = 127.0.0.1
cluster_addr = 127.0.0.1
auth_cluster_required = cephx
auth_service_required = cephx
auth_client_required = cephx
keyring = {folder}/keyring
run_dir = {folder}/run
admin_socket = {folder}/run/$name.asok
log_file = {folder}/$name.log
ms_bind_msgr1 = false
osd_pool_default_size = 1
osd_pool_default_min_size = 1
osd_pool_default_pg_num = 1
osd_pool_default_pgp_num = 1
osd_pool_default_pg_autoscale_mode = off
osd_crush_chooseleaf_type = 0
mon_allow_pool_size_one = true
mon_max_pg_per_osd = 500
mon_data = {folder}/mon
mon_data_avail_crit = 1
paxos_propose_interval = 0.02
paxos_min_wait = 0.01
osd_data = {folder}/osd
osd_objectstore = memstore
memstore_device_bytes = {memory_bytes}
rgw_frontends = beast endpoint=127.0.0.1:{port}
rgw_data = {folder}/rgw
rgw_dns_name = localhost
rgw_rados_pool_pg_num_min = 1
rgw_thread_pool_size = 32
rgw_gc_obj_min_wait = 1
rgw_gc_processor_period = 2
rgw_gc_processor_max_time = 2
"""


def missing_programs(programs: Sequence[str] = PROGRAMS) -> tuple[str, ...]:
    """Which of the programs are not installed; a test skips when there are any."""
    return tuple(name for name in programs if shutil.which(name) is None)


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Radosgw:
    """Start, stop and kill a radosgw of one's own on loopback.

    Args:
        folder: Where configuration, keys and logs go; keep the path short (sockets live in it).
        memory_bytes: The size of its store, which is in memory.

    Attributes:
        endpoint: `http://127.0.0.1:PORT`; path-style addressing, region us-east-1.
        access_key: The key id of its one user.
        secret_key: The secret of that user, random.
    """

    region = "us-east-1"

    def __init__(self, folder: Path, memory_bytes: int = 2 << 30) -> None:
        self.folder, self._memory_bytes = Path(folder), memory_bytes
        self._port, self._mon_port, self._fsid = free_port(), free_port(), str(uuid.uuid4())
        self.endpoint = f"http://127.0.0.1:{self._port}"
        self.access_key, self.secret_key = "AK" + secrets.token_hex(9).upper(), secrets.token_hex(20)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> Radosgw:
        """Start everything; a second or two. Returns itself.

        Raises:
            UnavailableError: A program is not installed, or something did not come up; names its log.
        """
        absent = missing_programs()
        if absent:
            raise UnavailableError(
                f"radosgw needs {', '.join(absent)}", hint="apt-get install radosgw ceph-mon ceph-osd"
            )
        try:
            self._write_folder()
            self._make_keys()
            self._start_monitor()
            self._start_store()
            self.start_gateway()
            self._run("radosgw-admin", "user", "create", "--uid=u", "--display-name=u",
                      f"--access-key={self.access_key}", f"--secret-key={self.secret_key}")  # fmt: skip
        except BaseException:
            self.stop()
            raise
        return self

    def start_gateway(self) -> None:
        """Start the gateway alone, after `kill`: what was stored is still there."""
        self._spawn("gateway", "radosgw", "-n", "client.rgw", "-f")
        self._wait_until(self._answers, "radosgw")

    def kill(self) -> None:
        """SIGKILL the gateway: requests in flight are cut, what was acknowledged stays."""
        self._end("gateway")

    def stop(self) -> None:
        """Kill every process and wait for it; the store is gone then. Safe to call twice."""
        for name in ("gateway", "store", "monitor"):
            self._end(name)

    # ------------------------------------------------------------------ steps

    def _write_folder(self) -> None:
        for name in ("mon", "osd", "rgw", "run"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "ceph.conf").write_text(
            _CONFIG.format(fsid=self._fsid, folder=self.folder, mon_port=self._mon_port, port=self._port,
                           memory_bytes=self._memory_bytes)
        )  # fmt: skip

    def _make_keys(self) -> None:
        keyring = str(self.folder / "keyring")
        self._run("ceph-authtool", "-C", keyring, "-g", "-n", "mon.", "--cap", "mon", "allow *")
        for name, *caps in (
            ("client.admin", "mon", "allow *", "osd", "allow *", "mgr", "allow *"),
            ("osd.0", "mon", "allow profile osd", "osd", "allow *"),
            ("client.rgw", "mon", "allow rw", "osd", "allow rwx"),
        ):
            flags = [word for kind, cap in zip(caps[::2], caps[1::2], strict=True) for word in ("--cap", kind, cap)]
            self._run("ceph-authtool", keyring, "-g", "-n", name, *flags)

    def _start_monitor(self) -> None:
        monmap, keyring = str(self.folder / "monmap"), str(self.folder / "keyring")
        address = f"[v2:127.0.0.1:{self._mon_port}]"
        self._run("monmaptool", "--create", "--fsid", self._fsid, "--addv", "a", address, monmap)
        self._run("ceph-mon", "-i", "a", "--mkfs", "--monmap", monmap, "--keyring", keyring)
        self._spawn("monitor", "ceph-mon", "-i", "a", "-f")

    def _start_store(self) -> None:
        store = str(uuid.uuid4())
        self._run("ceph", "osd", "new", store, "0")
        self._run("ceph-osd", "-i", "0", "--mkfs", "--osd-uuid", store)
        self._spawn("store", "ceph-osd", "-i", "0", "-f")
        self._wait_until(lambda: b"1 up" in self._run("ceph", "osd", "stat"), "ceph-osd")

    # ------------------------------------------------------------------ processes

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.environ.get("PATH", ""), "CEPH_CONF": str(self.folder / "ceph.conf")}

    def _run(self, *command: str) -> bytes:
        done = subprocess.run(
            command, env=self._environment(), cwd=self.folder, capture_output=True, check=False, timeout=STEP_TIMEOUT_S
        )
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
            raise UnavailableError(f"{command[0]} failed with {done.returncode}: {' '.join(last)}")
        return done.stdout + done.stderr

    def _spawn(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._processes[name] = subprocess.Popen(
                command, env=self._environment(), cwd=self.folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.send_signal(signal.SIGKILL)  # monitor and store take seconds to end otherwise
            process.wait()

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(self.endpoint, timeout=5):
                return True
        except urllib.error.HTTPError:
            return True
        except OSError:
            return False

    def _wait_until(self, is_up: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_up():
            dead = [name for name, process in self._processes.items() if process.poll() is not None]
            if dead or time.monotonic() > deadline:
                raise UnavailableError(f"{what} did not come up: see the logs in {self.folder}")
            time.sleep(0.1)
