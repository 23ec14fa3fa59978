"""What the mount and the engine's worker say to each other, over one stream socket: values only, no paths, no shared
memory.

A frame is ``u32 length of message``, ``u64 length of payload`` (little-endian), the message (msgpack, one of the
structs below with its tag), the payload. The one large value of a message travels as payload, so that it is never
copied into and out of msgpack, and may lie in a file (``filevalue``) at either end. A reader that meets a tag it
doesn't know, or lengths over the limits, closes the connection: both ends are one version.
"""

from __future__ import annotations

import enum
import os
import socket
import struct

import msgspec

from esrfs.compaction.outcome import Outcome, Policy
from esrfs.engine import filevalue
from esrfs.engine.filevalue import FileValue

MESSAGE_LIMIT = 1 << 30
"""Bytes. A message holds a recipe, or an outcome with its AVIF; an original's verbatim parts make the largest."""
PAYLOAD_LIMIT = 1 << 32
"""Bytes. An original or a view: 200 megapixels of PNG are below 1 GiB."""

_HEAD = struct.Struct("<IQ")
_AT_ONCE = 1 << 30


class ConnectionLostError(Exception):
    """The other end is gone, or doesn't speak this protocol."""


class Lane(enum.IntEnum):
    """Smaller goes first; see ``lanes``."""

    INTERACTIVE = 0
    """Somebody waits for it."""
    READ_AHEAD = 1
    """Somebody may soon."""
    COMPACTION = 2


# From the mount to the worker.


class Rebuild(msgspec.Struct, frozen=True, tag="rebuild"):
    """Payload: the blob's AVIF. Answer: Rebuilt or Failed."""

    job: int
    lane: Lane
    recipe: bytes


class Compact(msgspec.Struct, frozen=True, tag="compact"):
    """Payload: the original. Answer: Compacted or Failed."""

    job: int
    policy: Policy
    networks: dict[str, bytes]
    """Those that may enlarge: name → sha256. Empty: scale 1 only."""
    reference_key: bytes = b""
    """Of the store, for the references in views (``blob/reference.py``); empty: none."""


class Upscale(msgspec.Struct, frozen=True, tag="upscale"):
    """Payload: an image file. Answer: Upscaled or Failed."""

    job: int
    network_sha256: bytes


class SetLane(msgspec.Struct, frozen=True, tag="lane"):
    job: int
    lane: Lane


class Cancel(msgspec.Struct, frozen=True, tag="cancel"):
    """Nobody waits for this job any more. It is still answered: with Failed, or with its result if that was sooner."""

    job: int


class Weights(msgspec.Struct, frozen=True, tag="weights"):
    """Payload: the file of the network that was asked for; or ``error`` says why there is none."""

    sha256: bytes
    error: str = ""


# From the worker to the mount.


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Sent once, when networks can run. Jobs may be sent before."""

    device: str
    threads: int


class NeedWeights(msgspec.Struct, frozen=True, tag="need_weights"):
    """Answered with Weights."""

    sha256: bytes


class Rebuilt(msgspec.Struct, frozen=True, tag="rebuilt"):
    """Payload: the view."""

    job: int
    sha256: bytes
    exact: bool
    """The view is, byte for byte, the one that the recipe pins."""


class Compacted(msgspec.Struct, frozen=True, tag="compacted"):
    job: int
    outcome: Outcome


class Upscaled(msgspec.Struct, frozen=True, tag="upscaled"):
    """Payload: a PNG."""

    job: int


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """The job ended without a result. Trying again would end the same."""

    job: int
    message: str


Request = Rebuild | Compact | Upscale | SetLane | Cancel | Weights
Report = Ready | NeedWeights | Rebuilt | Compacted | Upscaled | Failed
Message = Request | Report

DEVICE_FAILED = 75
"""Exit status of a worker whose accelerator failed: its jobs are to be tried again on the CPU (EX_TEMPFAIL)."""

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


Payload = bytes | memoryview | FileValue


def send(connection: socket.socket, message: Message, payload: Payload = b"") -> None:
    """Send one frame; frames of two threads must not interleave, so callers hold a lock of their own.

    Raises ConnectionLostError, also when the other end takes nothing for the socket's send timeout, or the payload's
    file can't be read; the connection is then of no use.
    """
    head = _encoder.encode(message)
    try:
        connection.sendall(_HEAD.pack(len(head), len(payload)) + head)
        for part in payload.chunks() if isinstance(payload, FileValue) else (payload,) if payload else ():
            connection.sendall(part)
    except OSError as error:
        raise ConnectionLostError(str(error)) from error


def receive(connection: socket.socket) -> tuple[Message, bytes]:
    """Wait for one frame: its message and its payload (empty for most). Raises ConnectionLostError at the end of the
    stream."""
    message, length = _receive_message(connection)
    return message, _exactly(connection, length)


def receive_small(connection: socket.socket) -> tuple[Message, bytes | FileValue]:
    """As ``receive``, for a process that must stay small: a view comes as a file."""
    message, length = _receive_message(connection)
    if not isinstance(message, Rebuilt):
        return message, _exactly(connection, length)
    try:
        value = filevalue.unnamed(length)
        buffer = memoryview(bytearray(min(length, filevalue.CHUNK)))
        offset = 0
        while offset < length:
            received = connection.recv_into(buffer[: length - offset])
            if not received:
                raise _ended()
            _write(value.descriptor, buffer[:received], offset)
            offset += received
    except OSError as error:
        raise ConnectionLostError(str(error)) from error
    return message, value


def _receive_message(connection: socket.socket) -> tuple[Message, int]:
    """A message, and the length of the payload that follows."""
    message_length, payload_length = _HEAD.unpack(_exactly(connection, _HEAD.size))
    if message_length > MESSAGE_LIMIT or payload_length > PAYLOAD_LIMIT:
        raise ConnectionLostError(f"a frame of {message_length} + {payload_length} bytes is none of this protocol's")
    try:
        return _decoder.decode(_exactly(connection, message_length)), payload_length
    except msgspec.DecodeError as error:
        raise ConnectionLostError(f"not a message of this protocol: {error}") from error


def _exactly(connection: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        try:
            part = connection.recv(min(count, _AT_ONCE), socket.MSG_WAITALL)
        except OSError as error:
            raise ConnectionLostError(str(error)) from error
        if not part:
            raise _ended()
        parts.append(part)
        count -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)  # nearly always one, which is not copied


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data = data[written:]
        offset += written


def _ended() -> ConnectionLostError:
    return ConnectionLostError("the other end closed the connection")
