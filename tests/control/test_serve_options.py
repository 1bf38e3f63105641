"""What `millrace serve` is asked for goes before what the spec says."""

from __future__ import annotations

from pathlib import Path

from millrace.control.served import Wanted
from millrace.control.supervise import config_of
from millrace.core.operations.live import ServeRequest
from millrace.core.spec import Serve
from millrace.serve.child import ServedModel

SPEC = Serve(queue_s=0.5, client_rate=7.0)


def test_quotas_and_the_bound_of_the_queue(tmp_path: Path) -> None:
    wanted = [Wanted(ServedModel(name="m", path=str(tmp_path)), None, {})]
    for body, queue_s, rate in (
        (ServeRequest(model="m"), 0.5, 7.0),
        (ServeRequest(model="m", queue_s=0.2, client_rate=0.0), 0.2, 0.0),
        (ServeRequest(model="m", client_rate=100.0, memory_budget="1GB"), 0.5, 100.0),
    ):
        config = config_of(tmp_path, wanted, body, SPEC)
        assert (config.server.queue_s, config.server.limits.client_rate) == (queue_s, rate)
