"""store.toml, opening a store, opening names beneath it, the catalog, and what is a blob."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
import sqlite3
import stat
import threading

import pytest
from msgspec import structs

from esrfs.compaction.outcome import Policy
from esrfs.store import layout, linux, metadata, mountpoint
from esrfs.store.beneath import beneath, open_parent, parent
from esrfs.store.catalog import Catalog, Entry
from esrfs.store.errors import Problem, StoreError
from esrfs.store.examine import examine
from esrfs.store.identity import Identity
from esrfs.store.initialise import init
from esrfs.store.layout import RESERVED, format_config, open_store, parse_config
from esrfs.store.swap import SwapMode, swap_mode

# ---- store.toml


@pytest.fixture
def root(tmp_path):
    path = tmp_path / "store"
    init(str(path))
    return path


def edit(root, old, new):
    toml = root / RESERVED / "store.toml"
    text = toml.read_text()
    assert old in text
    toml.write_text(text.replace(old, new))


def test_the_configuration_survives():
    config = layout.StoreConfig(
        format_version=1,
        features=["a", "b"],
        id="ab" * 16,
        key="cd" * 32,
        created='now "and" then\\',
        exclusive=True,
        undo_days=7,
        policy=Policy(preset="small", network="base-x4", min_saving=0.25, max_megapixels=12.5),
        probe=layout.Probe(exchange=True, leases=False, links=True, xattrs=False, locks=True, fsync=False),
    )
    assert layout.parse_config(layout.format_config(config), "here") == config


def test_what_is_private_is_private(root):
    assert stat.S_IMODE(os.stat(root / RESERVED).st_mode) == 0o700
    assert stat.S_IMODE(os.stat(root / RESERVED / "store.toml").st_mode) == 0o600


@pytest.mark.parametrize(
    ("old", "new"),
    [("format_version = 1", "format_version = 2\nsurprise = 3"), ("features = []", 'features = ["sparkles"]')],
)
def test_a_store_of_a_newer_esrfs_opens_read_only(root, old, new):
    edit(root, old, new)
    with open_store(str(root)) as store:
        assert store.readonly
        with pytest.raises(StoreError, match="read-only"):
            store.ledger  # noqa: B018


def test_a_store_of_a_newer_format_needs_no_more_than_id_and_key(root):
    id_line = next(line for line in (root / RESERVED / "store.toml").read_text().splitlines() if line.startswith("id"))
    (root / RESERVED / "store.toml").write_text(f'format_version = 9\n{id_line}\nkey = "{"ab" * 32}"\n')
    with open_store(str(root)) as store:
        assert store.readonly
        assert store.config.key == "ab" * 32


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("undo_days = 30", "", "undo_days"),
        ('preset = "high"', 'preset = "splendid"', "splendid"),
        ('key = "', 'key = "00', "wrong length"),
        ("[probe]", "[probe", "can't be read"),
    ],
)
def test_a_damaged_configuration_is_told(root, old, new, message):
    edit(root, old, new)
    with pytest.raises(StoreError, match=message) as error:
        open_store(str(root))
    assert error.value.problem is Problem.DAMAGED


def test_what_is_no_store_is_told(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StoreError, match="esrfs init") as error:
            open_store(str(path))
        assert error.value.problem is Problem.NOT_A_STORE


def test_opening_and_closing_leaves_no_descriptor_and_no_ledger(root):
    before = len(os.listdir("/proc/self/fd"))
    with open_store(str(root)):
        pass
    with pytest.raises(StoreError):
        open_store(str(root / "nothing"))
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.listdir(root / RESERVED / "ledger") == ["settled"]


def test_a_store_that_is_moved_while_open_goes_on(root):
    """Everything goes by descriptors: no path is resolved again."""
    with open_store(str(root)) as store:
        root.rename(root.with_name("moved"))
        digest = store.keep_network(b"weights")
        assert store.network_bytes(digest) == b"weights"
        assert store.ledger.name in os.listdir(store.ledger_fd)


def test_networks_are_kept_by_their_digest_and_checked(root):
    with open_store(str(root)) as store:
        digest = store.keep_network(b"weights")
        assert digest == hashlib.sha256(b"weights").digest()
        path = root / RESERVED / "networks" / digest.hex()
        path.write_bytes(b"broken")
        with pytest.raises(StoreError, match="damaged"):
            store.network_bytes(digest)
        assert store.keep_network(b"weights") == digest
        assert store.network_bytes(digest) == b"weights"
        path.unlink()
        with pytest.raises(StoreError, match="missing"):
            store.network_bytes(digest)
        assert os.listdir(root / RESERVED / "networks") == []


# ---- names beneath the root


@pytest.fixture(params=["openat2", "step by step"])
def tree(request, tmp_path, monkeypatch):
    if request.param == "step by step":

        def missing(*_):
            raise OSError(errno.ENOSYS, "no openat2")

        monkeypatch.setattr(linux, "openat2", missing)
    (tmp_path / "outside").write_text("secret")
    root = tmp_path / "root"
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "c").write_text("c")
    (root / "link").symlink_to("a/b/c")
    (root / "up").symlink_to("..")
    (root / "abs").symlink_to("/etc")
    fd = os.open(root, os.O_RDONLY)
    yield fd
    os.close(fd)


def test_names_beneath_the_root_open(tree):
    fd = beneath(tree, "a/b/c", os.O_RDONLY)
    assert os.read(fd, 9) == b"c"
    assert not os.get_inheritable(fd)
    os.close(fd)
    for path in ("", "a"):
        os.close(beneath(tree, path, os.O_RDONLY | os.O_DIRECTORY))
    os.close(beneath(tree, "a/new", os.O_CREAT | os.O_WRONLY, 0o600))
    assert stat.S_IMODE(os.stat("a/new", dir_fd=tree).st_mode) == 0o600


@pytest.mark.parametrize("path", ["link", "up/outside", "abs/passwd", "../outside", "a/../../outside", "/etc/passwd"])
def test_nothing_leads_out(tree, path):
    with pytest.raises(OSError) as error:
        beneath(tree, path, os.O_RDONLY)
    assert error.value.errno in (errno.ELOOP, errno.EXDEV, errno.ENOENT, errno.ENOTDIR)


def test_paths_longer_than_the_kernel_takes_open(tree):
    here = os.dup(tree)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=here)
        deeper = os.open("d" * 250, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = deeper
    os.close(os.open("end", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    path = "/".join(["d" * 250] * 20) + "/end"
    os.close(beneath(tree, path, os.O_RDONLY))
    os.close(here)


def test_parent_gives_a_directory_and_a_name(tree):
    assert parent(tree, "") == (tree, ".", False)
    assert parent(tree, "a") == (tree, "a", False)
    directory, name, owned = parent(tree, "a/b/c")
    assert os.stat(name, dir_fd=directory).st_size == 1
    assert owned
    os.close(directory)
    with open_parent(tree, "a/b/c") as (directory, name):
        os.fsync(directory)


# ---- is it a blob?


def test_what_is_no_blob_is_not_opened_or_not_believed(root):
    path = root / "file"
    with open_store(str(root)) as store:
        for size in (0, 13, 100, 64 * 5 + 13):
            path.write_bytes(b"esrfs" * 100 + bytes(size))
            os.truncate(path, size)
            fd = os.open(path, os.O_RDONLY)
            assert examine(store, fd, os.fstat(fd)) is None
            os.close(fd)


# ---- metadata


def test_metadata_is_carried_and_compared(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"22")
    one.chmod(0o4751)
    os.setxattr(one, "user.a", b"A")
    os.setxattr(two, "user.b", b"B")
    acl = bytes.fromhex("02000000") + b"".join(
        bytes.fromhex(text)
        for text in ("01000700ffffffff", "0200040010270000", "04000500ffffffff", "10000500ffffffff", "20000100ffffffff")
    )
    os.setxattr(one, "system.posix_acl_access", acl)
    os.utime(one, ns=(-5, -1_000_000_007))
    fds = [os.open(path, os.O_RDWR) for path in (one, two)]
    wanted = metadata.snapshot(fds[0])
    assert metadata.difference(wanted, metadata.snapshot(fds[1]))
    metadata.apply(fds[1], wanted)
    assert metadata.difference(wanted, metadata.snapshot(fds[1])) is None
    assert os.stat(two).st_mtime_ns == -1_000_000_007
    assert metadata.digest(wanted) == metadata.digest(metadata.snapshot(fds[1]))
    assert metadata.mark(fds[0]).handle != metadata.mark(fds[1]).handle
    for fd in fds:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become somebody else")
def test_an_owner_without_privileges_can_carry_metadata(tmp_path):
    """chown is not asked for where nothing would change."""
    tmp_path.chmod(0o777)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        message = "failed"
        try:
            os.chdir(tmp_path)
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            fds = [os.open(name, os.O_RDWR | os.O_CREAT, 0o644) for name in ("one", "two")]
            os.fchmod(fds[0], 0o600)
            metadata.apply(fds[1], metadata.snapshot(fds[0]))
            message = str(metadata.difference(metadata.snapshot(fds[0]), metadata.snapshot(fds[1])))
        except OSError as error:
            message = repr(error)
        finally:
            os.write(write, message.encode())
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    message = os.read(read, 1000).decode()
    os.close(read)
    assert message == "None"


def test_signatures_over_the_content_are_not_carried():
    plain = metadata.Metadata(0o644, 0, 0, 0, 0, {"user.a": b""})
    assert metadata.not_carriable(plain) is None
    signed = metadata.Metadata(0o644, 0, 0, 0, 0, {"security.ima": b"x"})
    assert "security.ima" in (metadata.not_carriable(signed) or "")


# ---- the catalog

ONE = Identity(1, 2, 3, 4, 5)
BLOB = Entry(state="blob", view_size=100, stored_bytes=10, sha256_view=b"x" * 32, score=71.5, path="a/\udcff.jpg")


@pytest.fixture
def database(tmp_path):
    return str(tmp_path / "catalog.db")


@pytest.fixture
def catalog(database):
    one = Catalog(database)
    yield one
    one.close()


def test_an_entry_holds_for_that_very_content(catalog):
    catalog.put(ONE, BLOB)
    assert catalog.get(ONE) == BLOB
    for field in ("dev", "ino", "size", "mtime_ns", "ctime_ns"):
        other = Identity(**{name: getattr(ONE, name) + (name == field) for name in ONE.__slots__})
        assert catalog.get(other) is None


def test_a_reused_inode_replaces_its_predecessor(catalog):
    catalog.put(ONE, BLOB)
    later = Identity(1, 2, 30, 40, 50)
    catalog.put(later, Entry(state="refused", view_size=7, stored_bytes=7))
    assert catalog.get(ONE) is None
    assert [identity for identity, _ in catalog.entries()] == [later]


def test_large_numbers_and_negative_times_survive(catalog):
    large = Identity((1 << 64) - 1, (1 << 63) + 5, 1 << 62, -5, -6)
    catalog.put(large, BLOB)
    assert catalog.get(large) == BLOB
    assert list(catalog.entries()) == [(large, BLOB)]


def test_the_catalog_lists_and_forgets(catalog):
    catalog.put(ONE, BLOB)
    catalog.put(Identity(1, 9, 3, 4, 5), Entry(state="original", view_size=5, stored_bytes=4096))
    catalog.set_path(ONE, "b")
    assert [entry.path for _, entry in catalog.entries("blob")] == ["b"]
    catalog.forget(ONE)
    assert [entry.state for _, entry in catalog.entries()] == ["original"]


def test_the_catalog_outlives_its_process(database):
    first = Catalog(database)
    first.put(ONE, BLOB)
    first.close()
    second = Catalog(database)
    assert second.get(ONE) == BLOB
    second.close()
    assert second.get(ONE) is None  # closed: no error


@pytest.mark.parametrize("damage", [b"not a database at all" * 500, b""])
def test_a_broken_catalog_is_begun_anew(database, expect_log, damage):
    expect_log("beginning a new one")
    with open(database, "wb") as file:
        file.write(damage)
    catalog = Catalog(database)
    catalog.put(ONE, BLOB)
    assert catalog.get(ONE) == BLOB
    catalog.close()


def test_a_catalog_that_breaks_while_open_is_begun_anew(database, expect_log):
    expect_log("being rebuilt|beginning a new one")
    catalog = Catalog(database)
    for number in range(2000):
        catalog.put(structs_identity(number), BLOB)
    catalog._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    with open(database, "r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * 300_000)
    catalog._connection.execute("PRAGMA shrink_memory")
    for number in range(2000):
        catalog.get(structs_identity(number))
    catalog.put(ONE, BLOB)
    catalog.put(ONE, BLOB)
    assert catalog.get(ONE) == BLOB
    catalog.close()


def structs_identity(number):
    return Identity(1, 1000 + number, 3, 4, 5)


def test_a_catalog_of_another_version_is_begun_anew(database):
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE entries (old)")
    connection.execute("PRAGMA user_version=99")
    connection.close()
    catalog = Catalog(database)
    catalog.put(ONE, BLOB)
    assert catalog.get(ONE) == BLOB
    catalog.close()


def test_a_catalog_that_has_no_place_is_in_memory(tmp_path, expect_log):
    expect_log("in memory")
    catalog = Catalog(str(tmp_path / "missing" / "catalog.db"))
    catalog.put(ONE, BLOB)
    assert catalog.get(ONE) == BLOB
    catalog.close()


def test_a_disk_that_takes_nothing_costs_no_catalog(database, expect_log):
    """What it knows took hours to find out; the database is quite well."""
    expect_log("in memory")
    first = Catalog(database)
    first.put(ONE, BLOB)
    first.close()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        second = Catalog(database)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    second.put(structs_identity(0), BLOB)
    assert second.get(structs_identity(0)) == BLOB
    second.close()
    third = Catalog(database)
    assert [identity for identity, _ in third.entries()] == [ONE]
    third.close()


def test_threads_share_the_catalog(catalog):
    def work(start):
        for number in range(start, start + 100):
            catalog.put(structs_identity(number), BLOB)
            assert catalog.get(structs_identity(number)) == BLOB

    threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 400, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(catalog.entries("blob"))) == 400


# ---- mountpoints


def test_a_protected_mountpoint_takes_no_files(tmp_path):
    path = tmp_path / "view"
    path.mkdir(mode=0o750)
    before = mountpoint.protect_mountpoint(str(path))
    fd = mountpoint.open_mountpoint(str(path))
    try:
        assert before == mountpoint.Protection(0o750, False)
        assert mountpoint.is_protected(fd)
        if linux.is_immutable(fd) or os.geteuid() != 0:
            with pytest.raises(PermissionError):
                (path / "file").touch()
        assert mountpoint.protect_mountpoint(fd) == mountpoint.Protection(0o555, linux.is_immutable(fd))
    finally:
        mountpoint.unprotect_mountpoint(fd, before)
        os.close(fd)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750
    (path / "file").touch()


def test_swap_needs_what_the_probe_found(root):
    config = layout.read_config(str(root))

    def mode(exclusive, **found):
        return swap_mode(structs.replace(config, exclusive=exclusive, probe=structs.replace(config.probe, **found)))

    assert mode(False, exchange=True, leases=True) is SwapMode.EXCHANGE
    assert mode(False, exchange=True, leases=False) is None
    assert mode(True, exchange=True, leases=False) is SwapMode.EXCHANGE
    assert mode(True, exchange=False, leases=False, links=True) is SwapMode.LINK
    assert mode(False, exchange=False, leases=True) is None
    assert mode(True, exchange=False, leases=True, links=False) is None


def test_the_catalog_finds_blobs_by_their_pixels(catalog):
    reference = bytes(range(32))
    blob = Entry(state="blob", view_size=100, stored_bytes=10, path="a/\udcff.jpg", reference=reference)
    catalog.put(ONE, blob)
    catalog.put(Identity(1, 9, 3, 4, 5), Entry(state="blob", view_size=5, stored_bytes=4096, path="b"))
    assert catalog.get(ONE) == blob
    assert catalog.blobs_of(reference) == [(ONE, "a/\udcff.jpg")]
    assert catalog.blobs_of(bytes(32)) == catalog.blobs_of(b"") == []
    catalog.forget(ONE)
    assert catalog.blobs_of(reference) == []


def test_how_small_pictures_are_refined_is_the_owners_choice(tmp_path):
    text = format_config(init(str(tmp_path / "photos"), policy=Policy(refinement="idle")).config)
    policy = parse_config(text, "x").policy
    assert (policy.refinement, policy.refinement_seconds) == ("idle", 300)
    older = "\n".join(line for line in text.splitlines() if not line.startswith("refinement"))
    assert parse_config(older, "x").policy.refinement == "off"
    with pytest.raises(StoreError, match="refinement = 'sometimes'"):
        parse_config(text.replace('refinement = "idle"', 'refinement = "sometimes"'), "x")
    for seconds in ("0", "7200"):
        with pytest.raises(StoreError, match=f"refinement_seconds = {seconds}"):
            parse_config(text.replace("refinement_seconds = 300.0", f"refinement_seconds = {seconds}"), "x")


def test_what_views_carry_is_one_of_two(tmp_path):
    made = init(str(tmp_path / "store"))
    text = format_config(made.config)
    assert 'carry = "reference"' in text
    assert parse_config(text.replace('carry = "reference"', 'carry = "full"'), "x").policy.carry == "full"
    assert parse_config(text.replace('carry = "reference"', ""), "x").policy.carry == "reference"
    with pytest.raises(StoreError, match="carry = 'all'"):
        parse_config(text.replace('carry = "reference"', 'carry = "all"'), "x")
