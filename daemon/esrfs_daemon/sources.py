"""What becomes of a source file whose copy is safe: kept, put into the trash, deleted, replaced by a symlink.

Each step is a compare-and-swap. Between the last look at a file and its unlink, a program may save a newer version
under its name; so the name is first moved aside (``.esrfs-TOKEN.taken`` beside it, or into the trash), then what came
out is looked at, and put back if it is not the very file that was copied. Where leases work, a program that opens the
file for writing meanwhile waits, and the file is put back for it.

The freedesktop.org trash specification 1.0 is followed by own code: Send2Trash, the library for it, puts away whatever
has the name at that moment and does not say where, so neither the compare nor ``--undo`` could be had.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import re
import secrets
import stat
import urllib.parse
from collections.abc import Callable, Iterator

import platformdirs

from esrfs import faults
from esrfs.store import linux
from esrfs.store.beneath import beneath
from esrfs_daemon.copying import Identity

_TRASHES = re.compile(r"\.Trash(-[0-9]+)?|\.Trashes|\$RECYCLE\.BIN")

FAULT_POINTS = ("migrate.aside", "migrate.looked", "migrate.touched")


class Left(Exception):  # noqa: N818 (a state, not an error)
    """The source was left as it is, for a reason that people are told."""


class ChangedSince(Left):
    """It is not the file that was copied any more: worth another migration."""


def taken_name(token: str) -> str:
    """Where a source file lies, beside its name, while it is being touched."""
    return f".esrfs-{token}.taken"


def _nothing() -> None:
    pass


def delete(
    directory: int,
    name: str,
    expected: Identity,
    token: str,
    fd: int | None,
    *,
    ask: Callable[[], None] = _nothing,
) -> None:
    """Unlink ``name`` if it still is the file ``expected``. ``fd``: it, open for reading; None for a symlink.
    ``ask`` is called when it has left its name, and may raise Left or OSError: then it gets its name back.

    Raises Left, OSError (nothing was changed then).
    """
    aside = taken_name(token)
    with _nobody_writes(fd) as disturbed:
        _expect(directory, name, expected)
        move(directory, name, directory, aside)
        faults.reach("migrate.aside")
        try:
            _expect(directory, aside, expected, moved=True)
            ask()
            faults.reach("migrate.looked")
            if disturbed():
                raise ChangedSince("a program opened it for writing")
            os.unlink(aside, dir_fd=directory)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                put_back(directory, aside, directory, name)
            raise
    faults.reach("migrate.touched")


def replace_by_symlink(
    directory: int,
    name: str,
    expected: Identity,
    token: str,
    *,
    fd: int,
    target: str,
    ask: Callable[[], None] = _nothing,
) -> None:
    """Let ``name`` be a symlink to ``target`` (absolute), if it still is the file ``expected``. Raises as
    :func:`delete`."""
    aside = taken_name(token)
    with _nobody_writes(fd) as disturbed:
        _expect(directory, name, expected)
        try:
            os.symlink(target, aside, dir_fd=directory)
        except PermissionError as error:
            raise Left("the source's filesystem has no symlinks, or the folder can't be written") from error
        st = os.stat(name, dir_fd=directory, follow_symlinks=False)
        with contextlib.suppress(OSError):
            os.chown(aside, st.st_uid, st.st_gid, dir_fd=directory, follow_symlinks=False)
            os.utime(aside, ns=(st.st_atime_ns, st.st_mtime_ns), dir_fd=directory, follow_symlinks=False)
        faults.reach("migrate.aside")
        try:
            linux.renameat2(directory, aside, directory, name, linux.RENAME_EXCHANGE)
        except OSError as error:
            os.unlink(aside, dir_fd=directory)
            if error.errno in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise Left("the source's filesystem can't exchange a file and a link in one step") from error
            raise
        try:
            _expect(directory, aside, expected, moved=True)
            ask()
            faults.reach("migrate.looked")
            if disturbed():
                raise ChangedSince("a program opened it for writing")
        except BaseException:
            linux.renameat2(directory, aside, directory, name, linux.RENAME_EXCHANGE)
            os.unlink(aside, dir_fd=directory)
            raise
        os.unlink(aside, dir_fd=directory)
    faults.reach("migrate.touched")


def trash(
    directory: int,
    name: str,
    expected: Identity,
    path: str,
    fd: int | None,
    *,
    ask: Callable[[], None] = _nothing,
) -> None:
    """Put ``name`` (absolute: ``path``) into the trash of its filesystem, if it still is the file ``expected``.

    Raises as :func:`delete`; Left also where no trash can be made.
    """
    base, shown = trash_for(path, directory)
    with contextlib.ExitStack() as stack:
        info, files = (stack.enter_context(_folder(os.path.join(base, sub))) for sub in ("info", "files"))
        disturbed = stack.enter_context(_nobody_writes(fd))
        _expect(directory, name, expected)
        chosen, record = _reserve(info, files, name, shown)
        faults.reach("migrate.aside")
        moved = False
        try:
            move(directory, name, files, chosen)
            moved = True
            _expect(files, chosen, expected, moved=True)
            ask()
            faults.reach("migrate.looked")
            if disturbed():
                raise ChangedSince("a program opened it for writing")
        except BaseException as error:
            if moved:
                with contextlib.suppress(FileNotFoundError):
                    put_back(files, chosen, directory, name)
            os.unlink(record, dir_fd=info)
            if isinstance(error, OSError) and error.errno == errno.EXDEV:
                raise Left(f"the trash {base} is on another filesystem") from error
            raise
    faults.reach("migrate.touched")


def trash_for(path: str, directory: int) -> tuple[str, str]:
    """``(trash folder, path to note in it)`` for a file at ``path``, made if it is missing: the home trash on its
    filesystem, else the one at the filesystem's top. Raises Left."""
    device = os.fstat(directory).st_dev
    home = os.path.join(platformdirs.user_data_path(), "Trash")
    try:
        os.makedirs(home, 0o700, exist_ok=True)
        if os.stat(home).st_dev == device:
            return home, path
    except OSError:
        pass  # no home, or a home that is read-only: the file's own filesystem may have one
    top = _top(path)
    uid = os.getuid()
    shared = os.path.join(top, ".Trash")
    with contextlib.suppress(OSError):
        st = os.lstat(shared)
        if stat.S_ISDIR(st.st_mode) and st.st_mode & stat.S_ISVTX:
            mine = os.path.join(shared, str(uid))
            os.makedirs(mine, 0o700, exist_ok=True)
            return mine, os.path.relpath(path, top)
    own = os.path.join(top, f".Trash-{uid}")
    try:
        with contextlib.suppress(FileExistsError):
            os.mkdir(own, 0o700)
        st = os.lstat(own)
    except OSError as error:
        raise Left(f"no trash can be made at {top} ({error.strerror})") from error
    if not stat.S_ISDIR(st.st_mode) or st.st_uid != uid:
        raise Left(f"{own} is no trash of this user")
    return own, os.path.relpath(path, top)


def is_trash(folder: str) -> bool:
    """Whether a desktop or a camera card's computer keeps deleted files in this folder, by its name; the home trash's
    name is an ordinary word, so what is in it counts, too."""
    name = os.path.basename(folder)
    if name == "Trash":
        return all(os.path.isdir(os.path.join(folder, each)) for each in ("info", "files"))
    return _TRASHES.fullmatch(name) is not None


def in_trash(path: str, directory: int) -> Iterator[tuple[str, str]]:
    """``(file, its .trashinfo)`` of everything in the trash that was at ``path``, newest first."""
    with contextlib.suppress(Left, OSError):
        base, shown = trash_for(path, directory)
        noted = f"Path={_quoted(shown)}"
        found = []
        with os.scandir(os.path.join(base, "info")) as entries:
            for entry in entries:
                with contextlib.suppress(OSError), open(entry.path, encoding="utf-8", errors="replace") as file:
                    if noted in file.read(65536).splitlines():
                        found.append((entry.stat().st_mtime_ns, entry.path))
        for _, info in sorted(found, reverse=True):
            name = os.path.basename(info).removesuffix(".trashinfo")
            yield os.path.join(base, "files", name), info


def move(from_directory: int, from_name: str, to_directory: int, to_name: str) -> None:
    """Rename that never overwrites. Raises OSError; FileExistsError if ``to_name`` is taken."""
    try:
        linux.renameat2(from_directory, from_name, to_directory, to_name, linux.RENAME_NOREPLACE)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    else:
        return
    # A filesystem that knows no such flag. A link fails where the name is taken, too.
    try:
        os.link(from_name, to_name, src_dir_fd=from_directory, dst_dir_fd=to_directory, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
    else:
        os.unlink(from_name, dir_fd=from_directory)
        return
    # Neither (FAT on old kernels, some network shares): the best is to look first.
    try:
        os.stat(to_name, dir_fd=to_directory, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(from_name, to_name, src_dir_fd=from_directory, dst_dir_fd=to_directory)
    else:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), to_name)


def read_link(source_fd: int, path: str) -> str:
    """The target of a symlink in the source; empty if it is none."""
    above, _, name = path.rpartition("/")
    try:
        directory = beneath(source_fd, above, os.O_PATH | os.O_DIRECTORY)
    except OSError:
        return ""
    try:
        return os.readlink(name, dir_fd=directory)
    except OSError:
        return ""
    finally:
        os.close(directory)


def put_back(from_directory: int, from_name: str, directory: int, name: str) -> str:
    """Give a file its name back, or a name beside it where a newer file has the name; the name it has now.

    Raises OSError; FileNotFoundError if there is nothing to put back.
    """
    for candidate in names_beside(name, first=True):
        try:
            move(from_directory, from_name, directory, candidate)
        except FileExistsError:
            continue
        return candidate
    raise OSError(errno.EEXIST, "no free name", name)


def names_beside(name: str, first: bool = False) -> Iterator[str]:
    """``a (2).jpg``, ``a (3).jpg`` … for ``a.jpg``, none longer than 255 bytes; ``first``: ``a.jpg`` before them."""
    if first:
        yield name
    stem, dot, extension = name.rpartition(".")
    if not stem or len(extension) > 16:
        stem, dot, extension = name, "", ""
    for number in range(2, 10_000):
        tail = f" ({number}){dot}{extension}"
        room = 255 - len(os.fsencode(tail))
        shortened = stem
        while len(os.fsencode(shortened)) > room:
            shortened = shortened[:-1]  # whole characters
        yield shortened + tail


@contextlib.contextmanager
def _nobody_writes(fd: int | None) -> Iterator[Callable[[], bool]]:
    """Hold a read lease, where there are leases; the value asks "did somebody want to write meanwhile?"."""
    if fd is None:
        yield lambda: False
        return
    with contextlib.ExitStack() as stack:
        try:
            broken = stack.enter_context(linux.read_lease(fd))
        except BlockingIOError:
            raise ChangedSince("a program has it open for writing") from None
        except linux.LeasesUnavailable:
            yield lambda: False
        else:
            yield broken


def _expect(directory: int, name: str, expected: Identity, moved: bool = False) -> None:
    """``moved``: its change time moved, as we renamed it."""
    try:
        found = Identity.of(os.stat(name, dir_fd=directory, follow_symlinks=False))
    except FileNotFoundError:
        raise ChangedSince("it is gone: moved or deleted meanwhile") from None
    if found != expected and not (moved and found.is_same_content(expected) and found.mode == expected.mode):
        raise ChangedSince("it changed after it was copied")


def _top(path: str) -> str:
    """The root of the filesystem that the folder of ``path`` lies on."""
    at = os.path.realpath(os.path.dirname(path))
    while not os.path.ismount(at):
        at = os.path.dirname(at)
    return at


@contextlib.contextmanager
def _folder(path: str) -> Iterator[int]:
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise Left(f"the trash {path} can't be used ({error.strerror})") from error
    try:
        yield fd
    finally:
        os.close(fd)


def _reserve(info: int, files: int, name: str, shown: str) -> tuple[str, str]:
    """Write a ``.trashinfo`` under a name that neither folder has; ``(name of the file, of its record)``."""
    when = datetime.datetime.now().replace(microsecond=0).isoformat()
    text = f"[Trash Info]\nPath={_quoted(shown)}\nDeletionDate={when}\n".encode()
    room = 255 - len(".trashinfo") - 12
    short = name
    while len(os.fsencode(short)) > room:
        short = short[:-1]
    for candidate in (short, *(f"{short}.{secrets.token_hex(4)}" for _ in range(100))):
        record = f"{candidate}.trashinfo"
        try:
            fd = os.open(record, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=info)
        except FileExistsError:
            continue
        try:
            os.write(fd, text)
            os.fsync(fd)
        finally:
            os.close(fd)
        try:
            os.stat(candidate, dir_fd=files, follow_symlinks=False)
        except FileNotFoundError:
            return candidate, record
        os.unlink(record, dir_fd=info)
    raise Left("the trash has no free name for it")


def _quoted(path: str) -> str:
    """As the specification has it: percent-encoded bytes, slashes kept."""
    return urllib.parse.quote_from_bytes(os.fsencode(path), safe="/")
