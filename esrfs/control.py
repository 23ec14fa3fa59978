"""How a command talks to a running mount: JSON lines over a Unix socket in the runtime directory.

One connection carries one request, ``{"op": NAME, ...}``, and its replies: any number of ``{"event": {...}}``, then one
``{"result": {...}}`` or ``{"error": MESSAGE, "exit_code": NUMBER}``. Strings may hold lone surrogates (file names that
are not UTF-8, decoded with surrogateescape): JSON's ``\\udcXX`` carries them.

Who may ask: the user that runs the mount, and root. The directory is 0700, the socket 0600, and the peer's uid is asked
from the kernel as well. Nothing here knows what the operations do; the mount brings its handlers.

Threads: one accepts, and each connection has its own; all are daemons. ``ControlServer._lock`` protects the set of open
connections, so that ``stop`` can end them. Handlers run concurrently and lock what they touch themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from esrfs import config
from esrfs.exit_codes import ExitCode

log = logging.getLogger(__name__)

Emit = Callable[[dict[str, Any]], bool]
"""Send one event; False when the client is gone (then there is nobody to wait for; go on or end, as fits the work)."""
Handler = Callable[[dict[str, Any], Emit], dict[str, Any]]
"""Takes the request's arguments and returns the result. Raises ControlError for an error that the client shows."""

_LONGEST_LINE = 16 << 20
_CONNECTIONS = 64
_SEND_SECONDS = 10.0
"""A client that does not read for so long (stopped with Ctrl-Z) is given up: no thread of the mount waits for it."""
_REQUEST_SECONDS = 10.0
_PING_SECONDS = 2.0
_SUFFIX = ".sock"


class ControlError(Exception):
    """A message for people, and the exit code with which a command that meets it should end."""

    def __init__(self, message: str, exit_code: int = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def socket_path(store_id: str, mountpoint: str | os.PathLike[str]) -> Path:
    """Where the mount of the store with this id (hex) at ``mountpoint`` listens; the directory exists afterwards."""
    return config.runtime_directory() / _socket_name(store_id, mountpoint)


def find(store_id: str, mountpoint: str | os.PathLike[str] | None = None) -> Path | None:
    """The socket of a running mount of this store (at ``mountpoint``, or at any) that answers; None if there is none.

    Only mounts of the calling user are found.
    """
    pattern = f"{store_id}-*{_SUFFIX}" if mountpoint is None else _socket_name(store_id, mountpoint)
    for directory in _searched_directories():
        for path in sorted(directory.glob(pattern)):
            with contextlib.suppress(ControlError):
                call(path, "ping", timeout=_PING_SECONDS)
                return path
    return None


def call(
    path: Path,
    op: str,
    /,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    timeout: float | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Ask the mount that listens at ``path`` to do ``op``; return its result. Blocks until it is done.

    ``timeout`` bounds the wait for each single reply, in seconds. Raises ControlError with the mount's own message and
    exit code, with NOT_MOUNTED if nobody answers.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout)
        try:
            with _short_path(path) as short:
                connection.connect(short)
            connection.sendall(_line({**arguments, "op": op}))
            with connection.makefile("rb") as replies:
                while line := replies.readline(_LONGEST_LINE):
                    reply = json.loads(line)
                    if "result" in reply:
                        result: dict[str, Any] = reply["result"]
                        return result
                    if "error" in reply:
                        raise ControlError(reply["error"], reply["exit_code"])
                    if on_event is not None:
                        on_event(reply["event"])
        except TimeoutError as error:
            raise ControlError(f"the mount did not answer {op!r} within {timeout:g} s", ExitCode.NOT_MOUNTED) from error
        except (OSError, ValueError) as error:
            raise ControlError(f"no mount answers at {path}: {error}", ExitCode.NOT_MOUNTED) from error
    raise ControlError(f"the mount ended while it did {op!r}", ExitCode.NOT_MOUNTED)


class ControlServer:
    """Answers requests at ``path`` with ``handlers`` (by name of the operation) between ``start`` and ``stop``.

    ``ping`` is answered without a handler. A socket already at ``path``, left by a mount that was killed or held
    by one that is on its way out, is replaced in one step.
    """

    def __init__(self, path: Path, handlers: Mapping[str, Handler]) -> None:
        self.path = path
        self._handlers: dict[str, Handler] = {"ping": lambda _request, _emit: {"pid": os.getpid()}, **handlers}
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._listener: socket.socket | None = None
        self._inode = 0
        self._stopping = False

    def start(self) -> None:
        """Raises OSError when the socket can't be made."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        new = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            new.unlink(missing_ok=True)
            with _short_path(new) as short:
                listener.bind(short)
            new.chmod(0o600)
            listener.listen(_CONNECTIONS)
            self._inode = new.stat().st_ino
            new.replace(self.path)
        except OSError:
            listener.close()
            raise
        self._stopping = False
        self._listener = listener
        threading.Thread(target=self._accept, args=(listener,), name="control", daemon=True).start()

    def stop(self) -> None:
        """Stop listening and end open connections; handlers that run see their client gone. May be called twice."""
        self._stopping = True
        listener, self._listener = self._listener, None
        if listener is None:
            return
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() alone does not
        listener.close()
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:  # else a newer mount has taken the name over
                self.path.unlink()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                if not self._stopping:
                    log.exception("the control socket %s failed; commands can't reach this mount any more", self.path)
                return
            with self._lock:
                full = len(self._connections) >= _CONNECTIONS
                if not full:
                    self._connections.add(connection)
            if full:
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="control-client", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                reply = self._answer(connection)
                with contextlib.suppress(OSError):
                    connection.sendall(_line(reply))
        except Exception:
            log.exception("a request to the control socket failed")
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _answer(self, connection: socket.socket) -> dict[str, Any]:
        connection.settimeout(_REQUEST_SECONDS)
        try:
            with connection.makefile("rb") as lines:
                line = lines.readline(_LONGEST_LINE)
            # After reading: a client whose request nobody takes sees a broken pipe instead of this answer.
            if _peer_uid(connection) not in (os.geteuid(), 0):
                return _error("this mount belongs to another user; ask as that user, or as root", ExitCode.PERMISSION)
            request = json.loads(line)
            op = request.pop("op")
            handler = self._handlers[op]
        except (OSError, ValueError, AttributeError, TypeError):
            return _error("the request is not one JSON object on one line", ExitCode.USAGE)
        except KeyError as error:
            return _error(f"this mount does not know the operation {error}", ExitCode.USAGE)
        connection.settimeout(_SEND_SECONDS)

        def emit(event: dict[str, Any]) -> bool:
            try:
                connection.sendall(_line({"event": event}))
            except OSError:
                # A line that went out in part can't be followed by another: this client has heard its last.
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
                return False
            return True

        try:
            return {"result": handler(request, emit)}
        except ControlError as error:
            return _error(str(error), error.exit_code)
        except Exception as error:
            log.exception("the operation %r failed", op)
            return _error(f"{op} failed inside the mount: {error!r}; its log has the details", ExitCode.INTERNAL)


def _socket_name(store_id: str, mountpoint: str | os.PathLike[str]) -> str:
    # The caller's path may go through symlinks. realpath does not need the mountpoint to exist.
    place = hashlib.blake2s(os.fsencode(os.path.realpath(mountpoint)), digest_size=4).hexdigest()
    return f"{store_id}-{place}{_SUFFIX}"


def _searched_directories() -> list[Path]:
    """Where a mount of this user may listen: systemd may have started it without this shell's XDG_RUNTIME_DIR."""
    uid = os.getuid()
    directories = [config.runtime_directory(), Path(f"/run/user/{uid}/esrfs")]
    if uid == 0:
        directories.append(Path("/run/esrfs"))
    found = []
    for directory in dict.fromkeys(directories):
        with contextlib.suppress(OSError):
            if directory.stat().st_uid == uid:
                found.append(directory)
    return found


@contextlib.contextmanager
def _short_path(path: Path) -> Iterator[str]:
    """A name for ``path`` that fits the 108 bytes of a socket address, however deep the runtime directory lies."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


def _peer_uid(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return int(uid)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode("ascii") + b"\n"


def _error(message: str, exit_code: int) -> dict[str, Any]:
    return {"error": message, "exit_code": int(exit_code)}
