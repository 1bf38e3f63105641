"""The line: every message arrives whole and in order, and a broken one is an error, not a wait."""

from __future__ import annotations

import contextlib
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.compute.link import MAX_MESSAGE_BYTES, Cancel, Channel, Message, Order
from millrace.core.ports import HeartbeatFrame, MetricsFrame, OutputFrame, ProgressFrame, Work, WorkResult
from millrace.core.types import Artifact, MetricPoint

numbers = st.floats(allow_nan=False)
text = st.text(max_size=50)
artifacts = st.builds(Artifact, digest=text, size_bytes=st.integers(0, 2**60))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | numbers | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)
facts = st.dictionaries(text, plain, max_size=3)
messages = st.one_of(
    st.builds(ProgressFrame, done=numbers, total=numbers, text=text),
    st.builds(MetricsFrame, points=st.lists(st.builds(MetricPoint, text, text, st.integers(0, 9), numbers, numbers))),
    st.builds(OutputFrame, name=text, artifact=artifacts),
    st.builds(HeartbeatFrame, at=numbers, rss_bytes=st.integers(0, 2**50)),
    st.builds(
        WorkResult,
        state=st.sampled_from(["succeeded", "failed", "cancelled"]),
        facts=facts,
        outputs=st.dictionaries(text, artifacts, max_size=2),
        error=st.none() | facts,
    ),
    st.just(Cancel()),
)


def pair() -> tuple[Channel, Channel]:
    ours, theirs = socket.socketpair()
    return Channel(ours), Channel(theirs)


@given(st.lists(messages, max_size=8))
def test_messages_arrive_whole_and_in_order(sent: list[Message]) -> None:
    ours, theirs = pair()
    assert all(ours.send(message) for message in sent)
    ours.close()
    received = list(iter(theirs.receive, None))
    assert received == sent
    theirs.close()


def test_an_order_carries_its_work() -> None:
    ours, theirs = pair()
    work = Work(step_id="1", run_id="r", name="fit", implementation="m:f", spec=b"\x00{}\xff", params={"a": [1, None]})
    order = Order(entry="m:f", work=work, environment={"A": "b"}, import_path=["/x"])
    ours.send(order)
    assert theirs.receive() == order
    ours.close()
    theirs.close()


def test_senders_in_several_threads_do_not_mix_their_bytes() -> None:
    ours, theirs = pair()
    received: list[Message] = []
    reader = threading.Thread(target=lambda: received.extend(iter(theirs.receive, None)))
    reader.start()

    def send(number: int) -> None:
        for step in range(50):
            ours.send(ProgressFrame(done=step, total=number, text="x" * 20_000))

    threads = [threading.Thread(target=send, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ours.close()
    reader.join()
    theirs.close()
    for number in range(4):
        mine = [frame.done for frame in received if isinstance(frame, ProgressFrame) and frame.total == number]
        assert mine == list(range(50))


@given(st.binary(min_size=1, max_size=64))
def test_bytes_that_are_no_message_end_the_line(data: bytes) -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    ours.sendall(data)
    ours.close()
    with contextlib.suppress(ValueError):
        while channel.receive() is not None:
            continue  # a message by chance
    channel.close()


def test_a_huge_length_is_refused_before_memory_is_taken() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    ours.sendall((MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="at most"):
        channel.receive()
    ours.close()
    channel.close()


def test_half_a_message_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    ours.sendall(b"\x00\x00\x00\x09abc")
    ours.close()
    assert channel.receive() is None
    channel.close()


def test_sending_to_nobody_is_told() -> None:
    ours, theirs = pair()
    theirs.close()
    assert ours.send(Cancel()) is False
    assert ours.receive() is None
    ours.shutdown()
    ours.close()
