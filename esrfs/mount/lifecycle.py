"""The life of a mount: start, recovery, serving, end.

``run`` is what the command line calls. In the background it starts this package as a process of its own (never a
fork: the engine and libfuse start threads) and waits until the mount answers. The serving process, in this order:
store, lease of the compactor, recovery by the ledger, and then the mount; compaction and the undo window's upkeep
only after the mount answers.

The end comes by SIGTERM, SIGINT or SIGHUP, or by an unmount from outside. By a signal: compaction stops, the mount is
detached, waiting reads get a last while to finish and then fail with EIO, the process exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import json
import logging
import logging.handlers
import os
import re
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from esrfs import config, control, journal, prometheus
from esrfs.cache import ViewCache
from esrfs.engine.client import Engine, EngineSettings
from esrfs.exit_codes import ExitCode
from esrfs.mount import commands, figures, privileges, threads
from esrfs.mount.guard import guarded
from esrfs.mount.options import BadOption, MountOptions, parse
from esrfs.store import linux, recovery
from esrfs.store.catalog import Catalog
from esrfs.store.errors import Problem, StoreError
from esrfs.store.layout import Store, open_store
from esrfs.store.lease import RENEW_SECONDS, CompactorLease
from esrfs.upkeep import compact, explain, networks
from esrfs.upkeep.claims import Claims
from esrfs.upkeep.compact import CompactionUnavailable, Workshop
from esrfs.upkeep.retention import Retention, count_day, make_room
from esrfs.upkeep.scheduler import Scheduler
from esrfs.vfs.filesystem import Filesystem

log = logging.getLogger("esrfs.mount")

FILESYSTEM_TYPE = "fuse.esrfs"
READY_FD_VARIABLE = "ESRFS_READY_FD"
_LAST_READS_SECONDS = 20.0
"""After a signal, how long reads that wait may still take before they fail."""
_LAST_CLOSE_SECONDS = 3.0
"""And then, how long programs have to close their files."""
_SWITCH_SECONDS = 0.0005
"""Callbacks last some 20 microseconds: Python's 5 ms would have four readers wait for each other (measured: a tenth
to a quarter more small files on 4 threads; `python -m benchmarks.small_files`)."""
_IDLE_THREADS = 10
"""The kernel gives requests to idle threads in turn: many of them take each other's place in the caches (measured with
64: a sixth less files in a migration; `python -m benchmarks.migration`)."""
_LOG_BYTES = 4 << 20
_LOOKED_AT = 256
"""Entries of the view's root among which a file to read is looked for, before the mount calls itself ready."""
_MNT_DETACH = 2
_LOCAL = frozenset(("bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "tmpfs", "vfat", "xfs", "zfs"))
_REQUEST_TIMEOUTS = ("/proc/sys/fs/fuse/max_request_timeout", "/proc/sys/fs/fuse/default_request_timeout")
_EXIT_CODES = {
    Problem.NOT_A_STORE: ExitCode.NOT_A_STORE,
    Problem.REFUSED: ExitCode.REFUSED,
    Problem.PERMISSION: ExitCode.PERMISSION,
    Problem.BUSY: ExitCode.BUSY,
    Problem.DAMAGED: ExitCode.DAMAGE,
}


class CannotMount(Exception):  # noqa: N818 (it reads better where it is raised)
    """The message is for people; ``exit_code`` for scripts."""

    def __init__(self, message: str, exit_code: int = ExitCode.MOUNT_FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


# Starting.


def run(store_path: str, mountpoint: str, options: list[str], foreground: bool) -> int:
    """Mount the store at ``mountpoint``; both are absolute paths, ``options`` single values of ``-o``.

    In the background this returns when the mount answers; in the foreground the process ends with the mount, and this
    returns only if nothing was served. Returns an exit code; what went wrong is written to stderr.
    """
    code: int = ExitCode.INTERNAL
    try:
        code = _run(store_path, mountpoint, options, foreground)
    except Exception:
        if not threads.were_kept():
            raise
        log.exception("the mount ended in a way that esrfs did not expect; this is a bug of esrfs")
    if threads.were_kept():
        threads.leave(code)
    return code


def _run(store_path: str, mountpoint: str, options: list[str], foreground: bool) -> int:
    try:
        parse(options)  # a wrong option is told here, not in a log
        if foreground:
            journal.log_to_stderr()
            return serve(store_path, mountpoint, options, lambda: None)
        return _start_in_background(store_path, mountpoint, options)
    except BadOption as error:
        print(f"esrfs: {error}", file=sys.stderr)
        return ExitCode.USAGE
    except CannotMount as error:
        print(f"esrfs: {error}", file=sys.stderr)
        return error.exit_code
    except StoreError as error:
        print(f"esrfs: {error}", file=sys.stderr)
        return _EXIT_CODES.get(error.problem, ExitCode.FAILED)


def _start_in_background(store_path: str, mountpoint: str, options: list[str]) -> int:
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "esrfs.mount", store_path, mountpoint, *options],
            pass_fds=[writer],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
            env={**os.environ, READY_FD_VARIABLE: str(writer), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    finally:
        os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        answer = pipe.read()  # ends when the process says that it is ready, or is gone
    if answer:
        report = json.loads(answer)
        if report.get("ready"):
            return ExitCode.OK
        raise CannotMount(report["error"], report["exit_code"])
    status = process.wait()
    raise CannotMount(f"{mountpoint}: the mount's process ended before it was ready (status {status})")


def serve_in_background(arguments: list[str]) -> int:
    """The process that :func:`run` starts: serves, and reports through a pipe whether it got so far."""
    writer = int(os.environ.pop(READY_FD_VARIABLE))
    os.set_inheritable(writer, False)
    store_path, mountpoint, *options = arguments
    reported = False

    def report(**values: object) -> None:
        nonlocal reported
        if not reported:
            reported = True
            with contextlib.suppress(BrokenPipeError):  # who started us was killed meanwhile: the mount serves others
                os.write(writer, json.dumps(values).encode())
            os.close(writer)

    try:
        return serve(store_path, mountpoint, options, lambda: report(ready=True))
    except (CannotMount, StoreError, BadOption) as error:
        code = (
            _EXIT_CODES.get(error.problem, ExitCode.FAILED) if isinstance(error, StoreError) else ExitCode.MOUNT_FAILED
        )
        report(error=str(error), exit_code=int(getattr(error, "exit_code", code)))
        return code
    except Exception as error:
        log.exception("the mount could not be started")
        report(error=f"{mountpoint}: {error!r}; this is a bug of esrfs", exit_code=int(ExitCode.INTERNAL))
        return ExitCode.INTERNAL


def _log_to_file(store: Store) -> None:
    """A background mount's log: the journal takes what systemd runs, the rest goes to the state directory."""
    path = config.state_directory(store.config.id) / "mount.log"
    try:
        handler = logging.handlers.RotatingFileHandler(path, maxBytes=_LOG_BYTES, backupCount=1)
    except OSError:
        return  # a full disk: the mount is worth more than its log
    handler.setFormatter(journal.OneLine("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.INFO)


# The mountpoint.


def _unescape(field: str) -> str:
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), os.fsencode(field)))


def _mounts() -> Iterator[tuple[str, str, str]]:
    """(mountpoint, type, source) of every mount in this namespace, the last mounted last."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            before, _, after = line.partition(" - ")
            kind, source, *_ = after.split()
            yield _unescape(before.split()[4]), kind, _unescape(source)


def _is_on_network(store: Store) -> bool:
    """Whether the store's filesystem is, or may be, one that reports failed writes only at close."""
    st = os.fstat(store.root_fd)
    device = f"{os.major(st.st_dev)}:{os.minor(st.st_dev)}"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        kinds = {line.partition(" - ")[2].split()[0] for line in lines if line.split()[2] == device}
    return not kinds or not kinds <= _LOCAL


def _recover_mountpoint(mountpoint: str) -> None:
    """Detach a dead mount of ours (its process was killed); refuse one that lives. Raises CannotMount."""
    for _ in range(8):  # dead mounts may lie on top of each other
        here = [kind for place, kind, _ in _mounts() if place == mountpoint]
        try:
            os.statvfs(mountpoint)  # not stat: for a second the kernel knows the answer without asking the dead process
        except OSError as error:
            if error.errno == errno.ENOTCONN and here and here[-1] == FILESYSTEM_TYPE:
                log.warning("%s: a dead mount of esrfs is there (its process was killed); it is detached", mountpoint)
                _detach(mountpoint)
                continue
            if error.errno == errno.ENOENT:
                raise CannotMount(f"{mountpoint} does not exist; make it with: mkdir {mountpoint}") from error
            raise CannotMount(f"{mountpoint}: {error.strerror}") from error
        if here and here[-1] == FILESYSTEM_TYPE:
            raise CannotMount(f"{mountpoint} is mounted already; end it with: esrfs umount {mountpoint}", ExitCode.BUSY)
        return
    raise CannotMount(f"{mountpoint}: a dead mount could not be detached; try: umount -l {mountpoint}")


def _check_mountpoint(store_path: str, mountpoint: str) -> None:
    st = os.stat(mountpoint)
    if not stat.S_ISDIR(st.st_mode):
        raise CannotMount(f"{mountpoint} is no directory")
    real_store, real_mountpoint = os.path.realpath(store_path), os.path.realpath(mountpoint)
    if real_store == real_mountpoint or real_mountpoint.startswith(real_store + os.sep):
        raise CannotMount(
            f"{mountpoint} lies in the store {store_path}; choose a directory outside. To have photographs under the "
            "name that their folder has now, use: esrfs init --in-place",
            ExitCode.REFUSED,
        )
    for what, path in (
        ("the store", real_store),
        ("the cache", os.path.realpath(config.cache_directory(""))),
        ("esrfs's state", os.path.realpath(config.state_directory(""))),
    ):
        if path.startswith(real_mountpoint + os.sep):
            raise CannotMount(f"{what}, {path}, would be hidden by a mount at {mountpoint}", ExitCode.REFUSED)
    with contextlib.suppress(PermissionError):
        if os.listdir(mountpoint):
            raise CannotMount(f"{mountpoint} is not empty; a mount there would hide its files", ExitCode.REFUSED)


def _look(mountpoint: str) -> None:
    """List the view and read a byte of a file in it: what "ready" means. Raises OSError when the view can't be listed,
    but not when its listing is not ours to see.

    One file that can't be read (it is damaged, or not ours to read) says nothing of the mount.
    """
    with contextlib.suppress(PermissionError), os.scandir(mountpoint) as entries:
        for entry in itertools.islice(entries, _LOOKED_AT):
            if entry.is_file(follow_symlinks=False):
                with contextlib.suppress(OSError), open(entry.path, "rb", buffering=0) as file:
                    file.read(1)
                return


def _detach(mountpoint: str) -> None:
    """Unmount lazily: new accesses see the directory below at once, open files live on until they are closed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.umount2(os.fsencode(mountpoint), _MNT_DETACH) == 0:
        return
    result = subprocess.run(
        ["fusermount3", "-u", "-z", "--", mountpoint], capture_output=True, text=True, errors="replace", check=False
    )
    if result.returncode:
        log.warning("%s could not be detached: %s", mountpoint, result.stderr.strip())


# Serving.


def serve(store_path: str, mountpoint: str, options: list[str], ready: Callable[[], None]) -> int:
    """Mount and serve until the end; ``ready`` is called once the mount answers. Returns an exit code.

    Raises CannotMount, StoreError and BadOption before anything is mounted.
    """
    parsed = parse(options)
    # Signals come to the thread that waits for them, not into a callback; the engine's process gets its own mask.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
    linux.ignore_lease_signals()
    sys.setswitchinterval(_SWITCH_SECONDS)
    os.umask(0)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _recover_mountpoint(mountpoint)
    _check_mountpoint(store_path, mountpoint)
    with open_store(store_path, readonly=parsed.read_only) as store:
        if not logging.getLogger().handlers:
            _log_to_file(store)
        threading.excepthook = _log_end_of_thread
        _warn_of_timeouts()
        privileges.drop_capabilities()
        with Mount(store, mountpoint, parsed) as mount:
            return mount.serve(ready)


def _log_end_of_thread(end: threading.ExceptHookArgs) -> None:
    """Python would write it to stderr, which a mount in the background has not."""
    name = "unknown" if end.thread is None else end.thread.name
    log.error("the thread %s ended by a bug of esrfs; the mount goes on without", name, exc_info=end.exc_value)


def _warn_of_timeouts() -> None:
    for path in _REQUEST_TIMEOUTS:
        with contextlib.suppress(OSError, ValueError):
            seconds = int(Path(path).read_text())
            if seconds:
                log.warning(
                    "%s is %d: the kernel ends this whole mount when one read takes longer; set it to 0", path, seconds
                )


class Mount:
    """Everything that one mount holds, from the lease to the control socket; a context manager that gives it all
    back."""

    def __init__(self, store: Store, mountpoint: str, options: MountOptions) -> None:
        self._store = store
        self._mountpoint = mountpoint
        self._options = options
        self._lease: CompactorLease | None = None
        self._closing = contextlib.ExitStack()
        self._ending = threading.Event()
        self._served = threading.Event()
        self._one_end = threading.Lock()
        self._why_no_compaction = ""
        self._trouble = ""
        self._told: set[str] = set()
        """Names in staging that the log has."""
        self._recovered = False
        """What a crash had cut short is ended, since we have the lease."""
        self._failed = False

    def __enter__(self) -> Mount:
        store, options = self._store, self._options
        with contextlib.ExitStack() as opened:
            self._guard = opened.enter_context(guarded(self._mountpoint, config.state_directory(store.config.id)))
            if not store.readonly:
                opened.callback(self._let_go_of_lease)
                self._take_charge()
            self._catalog = Catalog(str(config.state_directory(store.config.id) / "catalog.db"))
            opened.callback(self._catalog.close)
            self._cache = ViewCache(config.cache_directory(store.config.id), options.cache_size, options.cache_floor)
            opened.callback(self._cache.close)
            self._engine = Engine(
                EngineSettings(device=options.device, idle_seconds=options.engine_idle, time_limit=options.time_limit),
                functools.partial(networks.network_bytes, store),
            )
            opened.callback(self._engine.close)
            claims = Claims()
            self._scheduler = Scheduler(
                Workshop(store, self._engine, self._catalog, claims, self._is_compactor),
                options.quiet,
                lambda: make_room(store),
            )
            opened.callback(self._scheduler.stop)
            self._filesystem = Filesystem(
                store,
                self._engine,
                self._cache,
                claims,
                on_change=self._scheduler.touch,
                explain=lambda path: explain.attributes(explain.explain(store, self._catalog, path)),
                wait_seconds=options.time_limit,
                threads=options.threads,
                errors_at_close=_is_on_network(store),
            )
            opened.callback(self._filesystem.close)
            self._closing = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        with self._one_end:
            self._closing.close()

    def _is_compactor(self) -> bool:
        return self._recovered and self._lease is not None and self._lease.held

    def _take_charge(self) -> None:
        """Take the lease if it is free, and end what a crash cut short.

        On a disk that is full or failing the ledger may take no record. What is there is served all the same, without
        compaction; :meth:`_keep_lease` comes back to it.
        """
        self._recovered = False
        try:
            if self._lease is None:
                self._lease = CompactorLease(self._store)
            self._lease.acquire()
            self._recover()
        except OSError as error:
            if not self._trouble:
                log.warning("%s: the ledger can't be written (%s); nothing is compacted", self._store.path, error)
            self._trouble = f"the ledger can't be written: {error.strerror}"
        else:
            self._trouble = ""
            self._recovered = True

    def _let_go_of_lease(self) -> None:
        if self._lease is not None:
            self._lease.close()

    def _recover(self) -> None:
        if self._lease is not None and self._lease.held:
            count_day(self._store)
        report = recovery.recover(self._store)
        for path in report.finished + report.undone:
            log.info("%s: a step that a crash had cut short was brought to its end", path)
        for name in report.found:
            log.warning("%s: a file that nothing explains was kept as .esrfs/originals/%s", self._store.path, name)
        for name in report.left:
            if name not in self._told:
                self._told.add(name)
                log.warning(
                    "%s: .esrfs/staging/%s/%s was not put there by esrfs, which leaves it alone; look at it",
                    self._store.path,
                    self._store.host,
                    name,
                )
        for problem in report.problems:
            log.warning("%s", problem)

    def _compaction_state(self) -> str:
        if self._why_no_compaction:
            return f"off: {self._why_no_compaction}"
        if self._trouble:
            return f"off: {self._trouble}"
        if self._store.readonly:
            return "off: the store is read-only"
        if self._lease is None or not self._lease.held:
            return "off: another mount compacts this store"
        if not self._recovered:
            return "off: what a crash cut short is still to be ended"
        return self._scheduler.state

    def serve(self, ready: Callable[[], None]) -> int:
        from esrfs.mount.adapter import Adapter  # noqa: PLC0415 (it loads libfuse3: only now is it needed)

        threading.Thread(target=self._wait_for_signal, name="esrfs-signals", daemon=True).start()
        source = self._store.path.replace("\\", "\\\\").replace(",", "\\,")
        libfuse: dict[str, str | bool] = {
            **self._options.libfuse,
            # A store of a newer format, or on a read-only filesystem, is only shown.
            **({"ro": True} if self._store.readonly else {}),
            "fsname": source,
            "subtype": "esrfs",
            "default_permissions": True,
            "max_threads": str(self._options.threads),
            "max_idle_threads": str(min(_IDLE_THREADS, self._options.threads)),
        }
        try:
            self._guard.before_mount()
            Adapter(
                self._filesystem,
                self._mountpoint,
                libfuse,
                lambda: threading.Thread(target=self._after_mount, args=(ready,), daemon=True).start(),
            )
        except RuntimeError as error:
            raise CannotMount(
                f"{self._mountpoint} could not be mounted (libfuse: status {error}). Is fuse3 installed, and may this "
                "user mount there?"
            ) from error
        finally:
            self._ending.set()
            self._served.set()
            self._guard.end()
        log.info("%s is unmounted", self._mountpoint)
        return ExitCode.MOUNT_FAILED if self._failed else ExitCode.OK

    def _after_mount(self, ready: Callable[[], None]) -> None:
        """Once libfuse serves: wait until the mount answers, say so, then begin with the work behind it."""
        try:
            _look(self._mountpoint)
        except OSError as error:
            log.error("%s can't be read: %s; the mount is ended", self._mountpoint, error)
            self._failed = True
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._guard.protect()
        try:
            server = control.ControlServer(
                control.socket_path(self._store.config.id, self._mountpoint),
                commands.handlers(
                    self._store,
                    self._catalog,
                    self._engine,
                    self._filesystem,
                    self._scheduler,
                    compaction_state=self._compaction_state,
                    mountpoint=self._mountpoint,
                ),
            )
            server.start()
            self._closing.callback(server.stop)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            log.error("%s: commands can't reach this mount: %s", self._mountpoint, error)
        how = ", read-only" if self._store.readonly else ""
        log.info("%s is mounted at %s%s", self._store.path, self._mountpoint, how)
        ready()
        privileges.notify_service_manager(f"READY=1\nSTATUS=shows {journal.printable(self._store.path)}{how}")
        if self._options.metrics is not None:
            self._serve_figures(self._options.metrics)
        if not self._store.readonly:
            threading.Thread(target=self._keep_lease, name="esrfs-lease", daemon=True).start()
            retention = Retention(self._store, self._is_compactor)
            retention.start()
            self._closing.callback(retention.stop)
            self._start_compaction()

    def _serve_figures(self, address: tuple[str, int]) -> None:
        """For Prometheus. The mount is worth more than its figures: without them it goes on."""
        try:
            stop = prometheus.serve(
                address,
                figures.collector(
                    self._store,
                    self._catalog,
                    self._engine,
                    self._filesystem,
                    self._scheduler,
                    compaction_state=self._compaction_state,
                    mountpoint=self._mountpoint,
                ),
            )
        except OSError as error:
            log.error("metrics can't be served at %s port %d: %s", *address, error)
        else:
            self._closing.callback(stop)

    def _start_compaction(self) -> None:
        if not self._options.compaction:
            self._why_no_compaction = "mounted with no_compaction"
            return
        try:
            compact.check_available(self._store)
        except CompactionUnavailable as error:
            self._why_no_compaction = str(error)
            log.warning("%s", error)
            return
        self._scheduler.start()

    def _keep_lease(self) -> None:
        while not self._ending.wait(RENEW_SECONDS):
            try:
                self._look_after_lease()
            except OSError as error:
                log.warning("%s: the compactor's lease: %s", self._store.path, error)
            except Exception:
                log.exception(
                    "%s: the compactor's lease could not be looked after; it is tried again", self._store.path
                )

    def _look_after_lease(self) -> None:
        lease = self._lease
        if lease is None or self._trouble:
            self._take_charge()
        elif not lease.held:
            self._recovered = False  # before we have it: the one before may have left something in the middle
            if lease.acquire():
                self._take_charge()
                if self._is_compactor():
                    log.info("%s: this mount compacts from now on", self._store.path)
        else:
            lease.renew()
            if not self._recovered:
                self._take_charge()

    # The end.

    def _wait_for_signal(self) -> None:
        number = signal.sigwait({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
        if self._ending.is_set():
            return
        log.info("%s: ends by %s", self._mountpoint, signal.Signals(number).name)
        privileges.notify_service_manager("STOPPING=1")
        self._ending.set()
        deadline = time.monotonic() + _LAST_READS_SECONDS
        self._scheduler.stop()
        _detach(self._mountpoint)
        while self._filesystem.waits.count and time.monotonic() < deadline:
            time.sleep(0.05)
        self._filesystem.fail_waiting_reads()
        # The kernel ends the connection when the last file is closed. Who keeps one open loses it when we exit.
        if not self._served.wait(_LAST_CLOSE_SECONDS):
            with self._one_end:
                self._closing.close()
                self._guard.end()
                log.info("%s is unmounted, though programs still have files of it open", self._mountpoint)
                threads.leave(ExitCode.OK)
