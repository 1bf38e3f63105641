"""HTTP/2 on the wire (RFC 9113): frames, settings, header blocks (RFC 7541). Nothing about connections."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import Any

from hpack import Decoder
from hpack.exceptions import HPACKError, OversizedHeaderListError
from hpack.table import HeaderTable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEAD_BYTES = 9
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, HAS_PRIORITY = 0x1, 0x1, 0x4, 0x8, 0x20
HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)
MAX_WINDOW = (1 << 31) - 1
FIRST_WINDOW = 65_535
SMALLEST_FRAME, LARGEST_FRAME = 16_384, (1 << 24) - 1
HEAD = struct.Struct(">IBI")  # length and type, flags, stream
_SETTING = struct.Struct(">HI")
_MAX_BLOCKS, _MAX_BLOCK_BYTES = 64, 1024
_RESIZES = frozenset(bytes((first,)) for first in range(0x20, 0x40))  # begin a block that resizes the table


class Code(IntEnum):
    """Why a stream or a connection ends."""

    NO_ERROR = 0
    PROTOCOL_ERROR = 1
    INTERNAL_ERROR = 2
    FLOW_CONTROL_ERROR = 3
    SETTINGS_TIMEOUT = 4
    STREAM_CLOSED = 5
    FRAME_SIZE_ERROR = 6
    REFUSED_STREAM = 7
    CANCEL = 8
    COMPRESSION_ERROR = 9
    ENHANCE_YOUR_CALM = 11


class ConnectionEnds(Exception):
    """The peer has broken the protocol, or costs too much: its connection ends with that code."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


class StreamEnds(Exception):
    """The same of one stream."""

    def __init__(self, code: Code) -> None:
        super().__init__(code.name)
        self.code = code


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """A whole frame.

    Example:
        >>> frame(PING, ACK, 0, bytes(8)).hex()
        '0000080601000000000000000000000000'
    """
    return HEAD.pack(len(payload) << 8 | kind, flags, stream) + payload


def settings(values: dict[int, int]) -> bytes:
    """A SETTINGS frame."""
    return frame(SETTINGS, 0, 0, b"".join(_SETTING.pack(*one) for one in values.items()))


def read_settings(payload: bytes) -> Iterator[tuple[int, int]]:
    """Names and values, checked; unknown ones too.

    Raises:
        ConnectionEnds: The length or a value is none that the protocol allows.

    Example:
        >>> list(read_settings(bytes.fromhex("000400010000")))
        [(4, 65536)]
    """
    if len(payload) % _SETTING.size:
        raise ConnectionEnds(Code.FRAME_SIZE_ERROR, "SETTINGS: want a multiple of 6 bytes")
    for name, value in _SETTING.iter_unpack(payload):
        if name == INITIAL_WINDOW_SIZE and value > MAX_WINDOW:
            raise ConnectionEnds(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE: want at most 2^31 - 1")
        if name == MAX_FRAME_SIZE and not SMALLEST_FRAME <= value <= LARGEST_FRAME:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE: want 2^14 to 2^24 - 1")
        if name == ENABLE_PUSH and value > 1:
            raise ConnectionEnds(Code.PROTOCOL_ERROR, "ENABLE_PUSH: want 0 or 1")
        yield name, value


def unpadded(flags: int, payload: bytes) -> bytes:
    """A payload without its padding.

    Raises:
        ConnectionEnds: The padding is longer than the payload.

    Example:
        >>> unpadded(PADDED, b"\\x02abc\\0\\0"), unpadded(0, b"abc")
        (b'abc', b'abc')
    """
    if not flags & PADDED:
        return payload
    if not payload:
        raise ConnectionEnds(Code.FRAME_SIZE_ERROR, "a padded frame has no length of its padding")
    end = len(payload) - payload[0]
    if end < 1:
        raise ConnectionEnds(Code.PROTOCOL_ERROR, "the padding is longer than its frame")
    return payload[1:end]


def literal(name: bytes, value: bytes) -> bytes:
    """A header of an answer, which no table remembers.

    Example:
        >>> literal(b"a", b"bc")
        b'\\x00\\x01a\\x02bc'
    """
    return b"\0" + _length(len(name)) + name + _length(len(value)) + value


def _length(size: int) -> bytes:
    if size < 0x7F:
        return bytes((size,))
    found = bytearray((0x7F,))
    size -= 0x7F
    while size >= 0x80:
        found.append(size & 0x7F | 0x80)
        size >>= 7
    found.append(size)
    return bytes(found)


class _Table(HeaderTable):
    """A dynamic table that tells when it grows."""

    has_grown = False

    def add(self, name: bytes, value: bytes) -> None:
        self.has_grown = True
        super().add(name, value)


class HeaderReader:
    """Decodes the header blocks of a connection.

    Clients send the same block call after call. One that leaves the dynamic table as it was means the same for as
    long as the table stays so: what was made of it is kept in `known`.

    Args:
        max_bytes: Of a header list, as the protocol counts.
    """

    def __init__(self, max_bytes: int) -> None:
        self._decoder = Decoder(max_bytes)
        self._table = self._decoder.header_table = _Table()
        self._is_steady = False
        self.known: dict[bytes, Any] = {}

    def read(self, block: bytes) -> list[tuple[bytes, bytes]]:
        """Its headers.

        Raises:
            ConnectionEnds: It cannot be decoded, or is too large: the table is lost.
        """
        self._table.has_grown = False
        headers: list[tuple[bytes, bytes]] = []
        try:
            at = self._read_indexed(block, headers)
            if at and block[at : at + 1] in _RESIZES:
                raise ConnectionEnds(Code.COMPRESSION_ERROR, "a header block resizes the table after a header")
            if at < len(block):
                headers += [(bytes(name), bytes(value)) for name, value in self._decoder.decode(block[at:], raw=True)]
        except OversizedHeaderListError as error:
            raise ConnectionEnds(Code.ENHANCE_YOUR_CALM, f"a header list is too large: {error}") from None
        except (HPACKError, LookupError) as error:
            raise ConnectionEnds(Code.COMPRESSION_ERROR, f"a header block cannot be decoded: {error}") from None
        self._is_steady = not self._table.has_grown and block[:1] not in _RESIZES
        if not self._is_steady:
            self.known.clear()
        return headers

    def _read_indexed(self, block: bytes, headers: list[tuple[bytes, bytes]]) -> int:
        """The headers at its beginning that stand in a table, a byte each: most of a client that was here before."""
        entry, left = self._table.get_by_index, self._decoder.max_header_list_size
        for at, first in enumerate(block):
            if not 0x80 < first < 0xFF:
                return at
            header = entry(first & 0x7F)
            left -= len(header[0]) + len(header[1]) + 32
            if left < 0:
                raise OversizedHeaderListError("want fewer headers")
            headers.append(header)
        return len(block)

    def keep(self, block: bytes, made: Any) -> None:
        """Remember what was made of the block that was read last, if it left the table as it was."""
        if self._is_steady and len(block) <= _MAX_BLOCK_BYTES:
            if len(self.known) >= _MAX_BLOCKS:
                self.known.clear()
            self.known[block] = made
