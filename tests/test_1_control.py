"""The control socket: requests, events, errors, and what a dead, slow or strange client must not do."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from pathlib import Path

import pytest

from esrfs import control
from esrfs.control import ControlError, ControlServer
from esrfs.exit_codes import ExitCode

STORE_ID = "ab" * 16


@pytest.fixture(autouse=True)
def runtime_directory(tmp_path, monkeypatch):
    # Deeper than the 108 bytes of a socket address: such runtime directories exist.
    directory = tmp_path / ("deep" * 20) / ("deeper" * 10)
    directory.mkdir(parents=True)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    return directory


@pytest.fixture
def serve():
    servers = []

    def start(mountpoint: str = "/photos", **handlers) -> Path:
        server = ControlServer(control.socket_path(STORE_ID, mountpoint), handlers)
        server.start()
        servers.append(server)
        return server.path

    yield start
    for server in servers:
        server.stop()


def test_a_request_brings_events_and_a_result(serve):
    def count(request, emit):
        for number in range(request["to"]):
            assert emit({"done": number})
        return {"total": request["to"], "path": request["path"]}

    path = serve(count=count)
    events = []
    # "path" is an argument of several operations, and must not clash with the socket's.
    result = control.call(path, "count", on_event=events.append, to=3, path="a/b.jpg")
    assert result == {"total": 3, "path": "a/b.jpg"}
    assert events == [{"done": 0}, {"done": 1}, {"done": 2}]


def test_names_that_are_not_utf8_survive(serve):
    path = serve(echo=lambda request, emit: request)
    name = os.fsdecode(b"caf\xe9.jpg")
    assert control.call(path, "echo", paths=[name]) == {"paths": [name]}


def test_errors_carry_their_message_and_exit_code(serve):
    def busy(request, emit):
        raise ControlError("a.jpg is open", ExitCode.BUSY)

    path = serve(busy=busy)
    with pytest.raises(ControlError, match=r"a\.jpg is open") as caught:
        control.call(path, "busy")
    assert caught.value.exit_code == ExitCode.BUSY
    with pytest.raises(ControlError, match="does not know") as caught:
        control.call(path, "dance")
    assert caught.value.exit_code == ExitCode.USAGE


def test_a_bug_in_a_handler_is_logged_and_told(serve, expect_log):
    expect_log("the operation 'broken' failed")

    def broken(request, emit):
        raise RuntimeError("oops")

    with pytest.raises(ControlError, match="oops") as caught:
        control.call(serve(broken=broken), "broken")
    assert caught.value.exit_code == ExitCode.INTERNAL


def test_only_the_owner_can_reach_the_socket(serve, monkeypatch):
    path = serve()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(control, "_peer_uid", lambda connection: os.geteuid() + 1)
    with pytest.raises(ControlError) as caught:
        control.call(path, "ping")
    assert caught.value.exit_code == ExitCode.PERMISSION


def test_find(serve):
    assert control.find(STORE_ID) is None
    photos, videos = serve("/photos"), serve("/videos")
    assert control.find(STORE_ID) in (photos, videos)
    assert control.find(STORE_ID, "/videos") == videos
    assert control.find(STORE_ID, "/music") is None
    assert control.find("cd" * 16) is None


def test_a_stale_socket_is_not_found_and_is_replaced(serve):
    path = control.socket_path(STORE_ID, "/photos")
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with control._short_path(path) as short:
        left.bind(short)
    left.close()
    assert control.find(STORE_ID) is None
    assert control.call(serve(), "ping") == {"pid": os.getpid()}


def test_stopping_the_old_mount_leaves_the_new_one_reachable():
    path = control.socket_path(STORE_ID, "/photos")
    old, new = ControlServer(path, {"who": lambda r, e: {"who": "old"}}), ControlServer(path, {"who": lambda r, e: {}})
    old.start()
    new.start()
    old.stop()
    assert control.call(path, "who") == {}
    new.stop()
    new.stop()
    assert not path.exists()


def test_a_client_that_leaves_is_noticed(serve):
    gone = threading.Event()

    def wait(request, emit):
        while emit({"still": "here"}):
            pass
        gone.set()
        return {}

    path = serve(wait=wait)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        with control._short_path(path) as short:
            client.connect(short)
        client.sendall(b'{"op": "wait"}\n')
        client.recv(10)
    assert gone.wait(10)
    control.call(path, "ping")


@pytest.mark.parametrize("request_line", [b"", b"\n", b"hello\n", b"[1]\n", b"7\n", b'{"no": "op"}\n', b"\xff\xfe\n"])
def test_nonsense_is_answered(serve, request_line):
    path = serve()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
        with control._short_path(path) as short:
            client.connect(short)
        client.sendall(request_line)
        client.shutdown(socket.SHUT_WR)
        assert json.loads(client.makefile().readline())["exit_code"] == ExitCode.USAGE
    control.call(path, "ping")


def test_a_mount_that_ends_in_the_middle_is_told(serve):
    entered = threading.Event()
    leave = threading.Event()

    def long(request, emit):
        entered.set()
        leave.wait(10)
        return {}

    server = ControlServer(control.socket_path(STORE_ID, "/x"), {"long": long})
    server.start()

    def stop():
        entered.wait(10)
        server.stop()
        leave.set()

    stopper = threading.Thread(target=stop)
    stopper.start()
    with pytest.raises(ControlError) as caught:
        control.call(server.path, "long")
    stopper.join()
    assert caught.value.exit_code == ExitCode.NOT_MOUNTED


def test_a_silent_mount_is_given_up(serve):
    leave = threading.Event()
    path = serve(silent=lambda request, emit: {"left": leave.wait(10)})
    with pytest.raises(ControlError, match=r"within 0\.05 s"):
        control.call(path, "silent", timeout=0.05)
    leave.set()
