"""Random sequences of operations on the vfs, without FUSE, against the same operations on an ordinary directory.

Blobs appear in the store under any name. A fake engine knows their views, so whatever is done to a view through
whichever handle, it has to behave as a plain file with the view's bytes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from esrfs.blob import container
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import JpegCoding, Literal, Recipe, Scores
from esrfs.cache import ViewCache
from esrfs.engine.client import Engine, Rebuilt
from esrfs.engine.filevalue import of_bytes
from esrfs.engine.protocol import Lane
from esrfs.store import linux
from esrfs.store.initialise import init
from esrfs.store.layout import Store, open_store
from esrfs.upkeep.claims import Claims
from esrfs.vfs.creating import Caller
from esrfs.vfs.filesystem import Filesystem

NAMES = st.sampled_from(["a", "b", "d", "d/a", "d/b", "e", "e/a", "d/f/a", "\udcff"])
FLAGS = st.sampled_from(
    [os.O_RDONLY, os.O_RDWR, os.O_WRONLY, os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_TRUNC, os.O_WRONLY | os.O_TRUNC]
)
OFFSETS = st.one_of(st.integers(0, 100), st.integers(3900, 4200), st.integers(9_900, 10_300))
DATA = st.binary(min_size=1, max_size=300)
CALLER = Caller(os.geteuid(), os.getegid(), 0o022)
HEAD, SCAN, TAIL = b"\xff\xd8" + b"head" * 1000, b"scan" * 1500, b"tail" * 20


class FakeEngine:
    """Answers at once, from memory."""

    def __init__(self) -> None:
        self.views: dict[bytes, bytes] = {}

    def rebuild(self, key: bytes, load: Callable[[], tuple[bytes, bytes]], lane: Lane, megapixels: float) -> FakeEngine:
        load()
        self.answer = Rebuilt(of_bytes(self.views[key]), key, True)
        return self

    def wait(self, timeout: float | None = None) -> Rebuilt:
        return self.answer

    def release(self) -> None:
        return None

    demote = close = release


def make_blob(store: Store, engine: FakeEngine, number: int) -> tuple[bytes, bytes]:
    """(blob, view), other ones for each number."""
    tail = TAIL + str(number).encode()
    view = HEAD + SCAN + tail
    digest = hashlib.sha256(view).digest()
    engine.views[digest] = view
    recipe = Recipe(
        width=64,
        height=48,
        original_size=len(view),
        sha256_original=digest,
        sha256_view=digest,
        preset="high",
        scale=2,
        network="",
        network_sha256=b"",
        quality=50,
        coding=JpegCoding(mode="RGB", subsampling="4:2:0", quantisation=[[16] * 64] * 3),
        prefix=[Literal(HEAD)],
        scan_length=len(SCAN),
        suffix=[Literal(tail)],
        encoder="",
        scores=Scores(ssimulacra2=71.0, worst_tile=62.0, psnr=35.0),
        created_by="esrfs",
    )
    avif = b"\0\0\0\x20ftypavif" + bytes(500)
    return container.pack(avif, recipe_format.encode(recipe), store.config.id_bytes, store.config.key_bytes), view


@dataclass(eq=False)
class Both:
    """One open file: a handle of the vfs, and a descriptor of the model."""

    number: int
    descriptor: int
    flags: int


class Operations(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.base = Path(tempfile.mkdtemp(prefix="esrfs-vfs-"))
        self.model = self.base / "model"
        self.model.mkdir()
        self.root = self.base / "store"
        init(str(self.root), exclusive=False)
        self.store = open_store(str(self.root))
        self.engine = FakeEngine()
        self.cache = ViewCache(self.base / "cache", 1 << 24, 0)
        self.fs = Filesystem(self.store, cast(Engine, self.engine), self.cache, Claims())
        self.open: list[Both] = []
        self.blobs = 0
        self.umask = os.umask(0)
        for name in ("d", "e"):
            self.mkdir(name)

    def teardown(self) -> None:
        try:
            for both in self.open:
                self.fs.release(both.number)
                os.close(both.descriptor)
            assert len(self.fs.handles) == 0
            self.same_trees()
            self.fs.close()
            self.fs.clear_cache()
            left = os.listdir(self.store.staging_fd)
            assert left == [], "nothing stays in staging"
        finally:
            os.umask(self.umask)
            self.cache.close()
            self.store.close()
            shutil.rmtree(self.base)

    # Helpers.

    def agree(self, ours: Callable[[], Any], theirs: Callable[[], Any]) -> tuple[Any, Any] | None:
        """Do both; their errors have to be the same. The results, or None after an error."""
        results: list[tuple[int | None, Any]] = []
        for action in (ours, theirs):
            try:
                results.append((None, action()))
            except OSError as error:
                # Which of two paths is wrong is for the kernel to find, before it asks a mount.
                results.append((errno.ENOENT if error.errno == errno.ENOTDIR else error.errno, None))
        (our_error, found), (their_error, expected) = results
        assert our_error == their_error, (
            f"{errno.errorcode.get(our_error or 0)} instead of {errno.errorcode.get(their_error or 0)}"
        )
        return None if our_error else (found, expected)

    def at(self, name: str) -> str:
        return os.path.join(self.model, name)

    def read(self, number: int, size: int, offset: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        count = self.fs.read_into(number, ctypes.addressof(buffer), size, offset)
        return buffer.raw[:count]

    # Operations.

    @rule(name=NAMES)
    def appears_as_blob(self, name: str) -> None:
        if os.path.lexists(self.at(name)) or not os.path.isdir(os.path.dirname(self.at(name))):
            return
        self.blobs += 1
        blob, view = make_blob(self.store, self.engine, self.blobs)
        for path, data in ((os.path.join(self.root, name), blob), (self.at(name), view)):
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as file:
                file.write(data)

    @precondition(lambda self: len(self.open) < 6)
    @rule(name=NAMES, flags=FLAGS, exclusive=st.booleans(), mode=st.sampled_from([0o644, 0o600]))
    def create(self, name: str, flags: int, exclusive: bool, mode: int) -> None:
        if os.path.isdir(self.at(name)):
            return  # the kernel knows
        extra = os.O_CREAT | (os.O_EXCL if exclusive else 0)
        opened = self.agree(
            lambda: self.fs.create(name, flags | extra, mode, CALLER).number,
            lambda: os.open(self.at(name), flags | extra, mode & ~CALLER.umask),
        )
        if opened:
            self.open.append(Both(*opened, flags))

    @precondition(lambda self: len(self.open) < 6)
    @rule(name=NAMES, flags=FLAGS)
    def open_file(self, name: str, flags: int) -> None:
        if os.path.isdir(self.at(name)):
            return  # the kernel does not ask to open a directory as a file
        opened = self.agree(lambda: self.fs.open(name, flags).number, lambda: os.open(self.at(name), flags))
        if opened:
            self.open.append(Both(*opened, flags))

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_file(self, data: st.DataObject) -> None:
        both = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.fs.flush(both.number)
        self.fs.release(both.number)
        os.close(both.descriptor)

    def pick(self, data: st.DataObject, writable: bool = False) -> Both | None:
        usable = [both for both in self.open if not writable or both.flags & os.O_ACCMODE != os.O_RDONLY]
        return usable[data.draw(st.integers(0, len(usable) - 1))] if usable else None

    @precondition(lambda self: self.open)
    @rule(data=st.data(), content=DATA, offset=OFFSETS)
    def write(self, data: st.DataObject, content: bytes, offset: int) -> None:
        both = self.pick(data, writable=True)
        if both is None:
            return
        append = bool(both.flags & os.O_APPEND)
        buffer = ctypes.create_string_buffer(content, len(content))
        address = ctypes.addressof(buffer)
        assert self.fs.write_from(both.number, address, len(content), offset, append) == len(content)
        assert os.pwrite(both.descriptor, content, offset) == len(content)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), size=st.sampled_from([1, 100, 5000, 20_000]), offset=OFFSETS)
    def read_part(self, data: st.DataObject, size: int, offset: int) -> None:
        both = self.pick(data)
        if both is not None and both.flags & os.O_ACCMODE != os.O_WRONLY:
            assert self.read(both.number, size, offset) == os.pread(both.descriptor, size, offset)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), length=OFFSETS)
    def truncate_handle(self, data: st.DataObject, length: int) -> None:
        both = self.pick(data, writable=True)
        if both is not None:
            self.fs.truncate_handle(both.number, length)
            os.ftruncate(both.descriptor, length)

    @rule(name=NAMES, length=OFFSETS)
    def truncate(self, name: str, length: int) -> None:
        if not os.path.isdir(self.at(name)):
            self.agree(lambda: self.fs.truncate(name, length), lambda: os.truncate(self.at(name), length))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), mode=st.sampled_from([0, 1, 3]), offset=OFFSETS, length=st.integers(1, 5000))
    def fallocate(self, data: st.DataObject, mode: int, offset: int, length: int) -> None:
        both = self.pick(data, writable=True)
        if both is not None:
            self.fs.fallocate(both.number, mode, offset, length)
            ctypes.CDLL(None).fallocate(both.descriptor, mode, ctypes.c_long(offset), ctypes.c_long(length))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), mode=st.sampled_from([0o600, 0o640, 0o755]))
    def chmod_handle(self, data: st.DataObject, mode: int) -> None:
        both = self.pick(data)
        if both is not None:
            self.fs.chmod_handle(both.number, mode)
            os.fchmod(both.descriptor, mode)

    @rule(name=NAMES, mode=st.sampled_from([0o600, 0o711, 0o755]))
    def chmod(self, name: str, mode: int) -> None:
        self.agree(lambda: self.fs.chmod(name, mode), lambda: os.chmod(self.at(name), mode))

    @rule(name=NAMES)
    def mkdir(self, name: str) -> None:
        self.agree(lambda: self.fs.mkdir(name, 0o755, CALLER), lambda: os.mkdir(self.at(name), 0o755))

    @rule(name=NAMES)
    def rmdir(self, name: str) -> None:
        self.agree(lambda: self.fs.rmdir(name), lambda: os.rmdir(self.at(name)))

    @rule(name=NAMES, hide=st.booleans())
    def unlink(self, name: str, hide: bool) -> None:
        def ours() -> None:
            if hide and not os.path.isdir(self.at(name)):
                self.fs.hide(name)
            else:
                self.fs.unlink(name)

        self.agree(ours, lambda: os.unlink(self.at(name)))

    @rule(old=NAMES, new=NAMES, flags=st.sampled_from([0, 0, linux.RENAME_NOREPLACE, linux.RENAME_EXCHANGE]))
    def rename(self, old: str, new: str, flags: int) -> None:
        def theirs() -> None:
            directory = os.open(self.model, os.O_RDONLY | os.O_DIRECTORY)
            try:
                linux.renameat2(directory, old, directory, new, flags)
            finally:
                os.close(directory)

        self.agree(lambda: self.fs.rename(old, new, flags), theirs)

    @rule(old=NAMES, new=NAMES)
    def link(self, old: str, new: str) -> None:
        self.agree(lambda: self.fs.link(old, new), lambda: os.link(self.at(old), self.at(new)))

    @rule(name=NAMES, value=st.binary(max_size=50))
    def setxattr(self, name: str, value: bytes) -> None:
        self.agree(
            lambda: self.fs.setxattr(name, "user.key", value, 0), lambda: os.setxattr(self.at(name), "user.key", value)
        )

    @rule(name=NAMES)
    def getxattr(self, name: str) -> None:
        found = self.agree(lambda: self.fs.getxattr(name, "user.key"), lambda: os.getxattr(self.at(name), "user.key"))
        assert found is None or found[0] == found[1]

    @rule()
    def forget_views(self) -> None:
        self.fs.clear_cache()

    # What must hold.

    @invariant()
    def same_handles(self) -> None:
        for both in self.open:
            st_model, (st_ours, size) = os.fstat(both.descriptor), self.fs.stat_handle(both.number)
            assert (size, stat.S_IMODE(st_ours.st_mode)) == (st_model.st_size, stat.S_IMODE(st_model.st_mode))
            if both.flags & os.O_ACCMODE != os.O_WRONLY:
                assert self.read(both.number, 20_000, 0) == os.pread(both.descriptor, 20_000, 0)

    @invariant()
    def same_trees(self) -> None:
        assert self.tree("") == self.model_tree(self.model)

    def tree(self, directory: str) -> dict[str, Any]:
        number = self.fs.opendir(directory)
        try:
            entries = list(self.fs.readdir(number, True))
        finally:
            self.fs.releasedir(number)
        found: dict[str, Any] = {}
        for entry in entries:
            path = f"{directory}/{entry.name}".lstrip("/")
            now, size = self.fs.stat(path)
            assert entry.attributes is not None
            assert (entry.attributes.st_ino, entry.size, stat.S_IFMT(now.st_mode)) == (
                now.st_ino,
                size,
                stat.S_IFMT(entry.kind),
            )
            if stat.S_ISDIR(now.st_mode):
                found[entry.name] = (now.st_mode, self.tree(path))
            else:
                opened = self.fs.open(path, os.O_RDONLY)
                found[entry.name] = (now.st_mode, now.st_nlink, size, self.read(opened.number, 20_000, 0))
                self.fs.release(opened.number)
        return found

    def model_tree(self, directory: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path in directory.iterdir():
            now = path.lstat()
            if path.is_dir():
                found[path.name] = (now.st_mode, self.model_tree(path))
            else:
                found[path.name] = (now.st_mode, now.st_nlink, now.st_size, path.read_bytes())
        return found


Operations.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestOperations = Operations.TestCase
