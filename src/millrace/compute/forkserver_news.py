"""What a driver and its fork server say to each other; apart, so that a driver need not import a worker's needs."""

from __future__ import annotations

import struct

REQUEST = struct.Struct("!I")  # the work's number; the worker's end of its line is attached
NEWS = struct.Struct("!cIi")  # kind, the work's number, value
BORN = b"B"  # value: process id
ENDED = b"E"  # value: wait status
REFUSED = b"R"  # value: errno of the fork
