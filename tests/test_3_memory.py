"""Memory: what passes through a process is not held there; what a large picture takes is bounded by its pixels."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator

import pytest

from esrfs.engine import filevalue, protocol
from esrfs.engine.protocol import ConnectionLostError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


def _send(connection: socket.socket, message: protocol.Message, payload: protocol.Payload) -> threading.Thread:
    thread = threading.Thread(target=protocol.send, args=(connection, message, payload))
    thread.start()
    return thread


def test_a_view_is_received_into_a_file(pair: tuple[socket.socket, socket.socket]) -> None:
    data = os.urandom(3 * filevalue.CHUNK + 17)
    message = protocol.Rebuilt(job=1, sha256=b"x" * 32, exact=True)
    thread = _send(pair[0], message, data)
    received, value = protocol.receive_small(pair[1])
    thread.join()
    assert received == message
    assert isinstance(value, filevalue.FileValue)
    assert value.read() == data
    thread = _send(pair[1], message, value)  # and from a file
    assert protocol.receive(pair[0]) == (message, data)
    thread.join()


def test_a_value_is_sent_as_long_as_was_said(pair: tuple[socket.socket, socket.socket]) -> None:
    """A file that becomes shorter while it is sent: the other end must not wait for ever for the rest."""
    value = filevalue.of_bytes(b"a" * 3000)
    os.truncate(value.descriptor, 1000)
    message = protocol.Cancel(job=1)
    thread = _send(pair[0], message, value)
    assert protocol.receive(pair[1]) == (message, b"a" * 1000 + bytes(2000))
    thread.join()


def test_the_end_of_a_stream_in_the_middle_of_a_view(pair: tuple[socket.socket, socket.socket]) -> None:
    message = protocol.Rebuilt(job=1, sha256=b"x" * 32, exact=True)
    head = protocol._encoder.encode(message)
    pair[0].sendall(protocol._HEAD.pack(len(head), 5000) + head + b"z" * 4000)
    pair[0].close()
    with pytest.raises(ConnectionLostError, match="closed"):
        protocol.receive_small(pair[1])


def test_a_value_closes_its_file() -> None:
    before = set(os.listdir("/proc/self/fd"))
    value = filevalue.of_bytes(b"abc")
    copy = filevalue.of_descriptor(value.descriptor, 3)
    del value
    assert copy.read() == b"abc"
    del copy
    assert set(os.listdir("/proc/self/fd")) == before
