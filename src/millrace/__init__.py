"""Millrace: a whole AI platform in one pip install.

Example:
    >>> import millrace
    >>> millrace.__version__
    '0.1.0'
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from millrace.client.sdk import Client
    from millrace.client.track import Tracker

__version__ = "0.1.0"


def connect(home: str | None = None) -> Client:
    """Open the home of the working directory, or the one named.

    Args:
        home: A folder; default: MILLRACE_HOME, else the nearest `.millrace` or spec upwards.

    Returns:
        A client: `run`, `model`, `models`, `runs`, `datasets`, `alerts`.
    """
    from millrace.client.sdk import Client
    from millrace.wiring import open_transport

    return Client(open_transport(home))


def track(
    name: str = "", *, params: dict[str, Any] | None = None, project: str = "default", home: str | None = None
) -> Tracker:
    """Log metrics, parameters and artifacts of any script as a run.

    Args:
        name: The run's name.
        params: Parameters known at the start.
        project: The project it belongs to.
        home: As in `connect`.

    Returns:
        A tracker: use it in a `with` block, so that the run ends with it.
    """
    from millrace.client.track import Tracker
    from millrace.wiring import open_transport

    return Tracker(open_transport(home), name=name, params=params or {}, project=project)
