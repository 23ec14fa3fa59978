"""What lies where in a store, and opening one.

``.esrfs/`` at the root (mode 0700, reserved: the view neither lists it nor lets anybody create it) holds

=================  =====================================================================================
``store.toml``     :class:`StoreConfig`: format, features, id, key, policy, what the probe found (mode 0600)
``staging/HOST/``  files on their way to a name, one directory for each machine (``staging.py``)
``ledger/``        the record of irreversible steps (``ledger.py``)
``originals/``     the undo window (``originals.py``)
``blobs/``         blobs whose last name went (``nameless.py``)
``networks/``      a copy of each network that a recipe may name, by sha256 (and of the shrinkers made for them)
``rules``          the owner's: which files are kept under another policy (``rules.py``); need not exist
``compactor``      the compactor's lease (``lease.py``)
=================  =====================================================================================

Catalog, view cache and sockets are not in the store; ``esrfs.config`` says where they are.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import socket
import threading
import tomllib
from dataclasses import dataclass, field

import msgspec

from esrfs.compaction.outcome import CARRIES, CHOICES, LONGEST_REFINEMENT, PATIENCES, REFINEMENTS, Policy
from esrfs.store import ledger
from esrfs.store.errors import Problem, StoreError
from esrfs.store.ledger import Ledger

RESERVED = ".esrfs"
FORMAT_VERSION = 1
KNOWN_FEATURES: frozenset[str] = frozenset()
"""Feature flags that this version may write under; a store with others is opened read-only."""

CONFIG = "store.toml"
STAGING = "staging"
LEDGER = "ledger"
ORIGINALS = "originals"
NETWORKS = "networks"
BLOBS = "blobs"

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """What the store's filesystem can do, as ``init`` found it."""

    exchange: bool
    """Two names can be exchanged atomically (RENAME_EXCHANGE)."""
    leases: bool
    """Read leases are granted: a writer elsewhere is noticed."""
    links: bool
    xattrs: bool
    """``user.*`` attributes."""
    locks: bool
    """flock."""
    fsync: bool
    """Files and directories can be fsynced."""


class StoreConfig(msgspec.Struct, frozen=True, kw_only=True):
    """``store.toml``. Unknown keys are ignored when it is read: only ``features`` may forbid."""

    format_version: int
    features: list[str]
    id: str
    """16 bytes in hex."""
    key: str
    """32 bytes in hex: blobs are authenticated with it, so it must not leave the store."""
    created: str
    """ISO date and time, UTC, for people."""
    exclusive: bool
    """The owner says that nothing but esrfs writes into this directory."""
    undo_days: int
    policy: Policy
    probe: Probe

    @property
    def id_bytes(self) -> bytes:
        return bytes.fromhex(self.id)

    @property
    def key_bytes(self) -> bytes:
        return bytes.fromhex(self.key)


_TEMPLATE = """\
# An esrfs store. The files beside the directory of this one are yours; some are stored small (see `esrfs status`).
# Keep this file: without the key in it, the small files are shown as the AVIF pictures they are. Keep it private, too.

format_version = {format_version}
features = {features}
id = {id}
key = {key}
created = {created}

# true: nothing but esrfs writes into this directory (needed where the filesystem has no atomic exchange or no leases)
exclusive = {exclusive}

# days for which the original of a compacted file can be brought back (`esrfs restore`)
undo_days = {undo_days}

[policy]
preset = {preset}  # faithful, high, balanced, small, lossless; for some files: see the file rules, beside this one
network = {network}  # a family (lite-x2 and so on are of the family lite), or one network
patience = {patience}  # low, normal, high, endless: time spent on each picture for fewer bytes
refinement = {refinement}  # off, idle, always: fit small pictures to the network; idle: if nothing else is to be done
refinement_seconds = {refinement_seconds}  # that this may take for each photograph
min_saving = {min_saving}  # a file is left alone unless it shrinks by at least this share
min_saving_lossless = {min_saving_lossless}  # the same where it comes back bit for bit
max_megapixels = {max_megapixels}
# full: where there is room, a photograph carries what it is stored as, so that another store need not make it again. An
# editor that keeps what it does not know then ships that, too, even of a picture that was cropped.
carry = {carry}  # reference, full

[probe]  # what `esrfs init` found the filesystem able to do
exchange = {exchange}
leases = {leases}
links = {links}
xattrs = {xattrs}
locks = {locks}
fsync = {fsync}
"""


def format_config(config: StoreConfig) -> str:
    """``config`` as the text of a store.toml. Every value is a number, a boolean, a list or a string, for all of which
    JSON's notation is TOML's.
    """
    values = msgspec.to_builtins(config)
    values.update(values.pop("policy"))
    values.update(values.pop("probe"))
    return _TEMPLATE.format(**{name: json.dumps(value) for name, value in values.items()})


def parse_config(text: str, where: str) -> StoreConfig:
    """Read a store.toml of this or an older format version. Raises StoreError."""
    try:
        values = tomllib.loads(text)
        config = msgspec.convert(values, StoreConfig)
        if len(config.id_bytes) != 16 or len(config.key_bytes) != 32:
            raise ValueError("id or key has the wrong length")
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError) as error:
        raise StoreError(
            f"{where} can't be read: {error}. Nothing was changed. Repair it, or take it from a backup.",
            Problem.DAMAGED,
        ) from error
    if config.policy.patience not in PATIENCES:
        raise StoreError(
            f"{where} asks for the patience {config.policy.patience!r}, which is none of {', '.join(PATIENCES)}. "
            "Correct it.",
            Problem.DAMAGED,
        )
    if config.policy.refinement not in REFINEMENTS:
        raise StoreError(
            f"{where} says refinement = {config.policy.refinement!r}, which is none of {', '.join(REFINEMENTS)}. "
            "Correct it.",
            Problem.DAMAGED,
        )
    if not 0 < config.policy.refinement_seconds <= LONGEST_REFINEMENT:
        raise StoreError(
            f"{where} says refinement_seconds = {config.policy.refinement_seconds:g}; it must be more than 0 and at "
            f"most {LONGEST_REFINEMENT:g}. Correct it.",
            Problem.DAMAGED,
        )
    if config.policy.preset not in CHOICES:
        raise StoreError(
            f"{where} asks for the preset {config.policy.preset!r}, which is none of {', '.join(CHOICES)}. Correct it.",
            Problem.DAMAGED,
        )
    if config.policy.carry not in CARRIES:
        raise StoreError(
            f"{where} says carry = {config.policy.carry!r}, which is none of {', '.join(CARRIES)}. Correct it.",
            Problem.DAMAGED,
        )
    return config


@dataclass(eq=False)
class Store:
    """An open store. The descriptors are directories and belong to the store; :func:`close` ends them all.

    Threads may share it: the descriptors never change, and the ledger has its own lock.
    """

    path: str
    """As it was given: for messages only."""
    config: StoreConfig
    readonly: bool
    root_fd: int
    meta_fd: int
    ledger_fd: int
    originals_fd: int
    networks_fd: int
    blobs_fd: int
    """-1 in a read-only store that has none."""
    staging_fd: int
    """This host's own staging directory; -1 in a read-only store that has none."""
    host: str
    boot: str
    session: str
    """8 hex digits, drawn at random: this process's part of staging names and its ledger's name."""
    _ledger: Ledger | None = None
    _ledger_lock: threading.Lock = field(default_factory=threading.Lock)  # protects the making of _ledger

    @property
    def ledger(self) -> Ledger:
        """This process's own ledger; made on first use. Raises OSError, or StoreError in a read-only store."""
        with self._ledger_lock:
            if self._ledger is None:
                if self.readonly:
                    raise StoreError(f"{self.path} is open read-only; nothing was changed.", Problem.UNSUPPORTED)
                self._ledger = Ledger(self.ledger_fd, self.host, self.boot, self.session)
            return self._ledger

    def close(self) -> None:
        """End this process's session with the store. Files opened through it stay open."""
        if self._ledger is not None:
            self._ledger.close()
        for name in ("staging_fd", "blobs_fd", "networks_fd", "originals_fd", "ledger_fd", "meta_fd", "root_fd"):
            fd = getattr(self, name)
            if fd >= 0:
                os.close(fd)
                setattr(self, name, -1)

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def network_bytes(self, sha256: bytes) -> bytes:
        """The network's file that recipes call by this digest. Raises StoreError when it is missing or damaged."""
        name = sha256.hex()
        try:
            data = _read(self.networks_fd, name)
        except FileNotFoundError:
            raise StoreError(
                f"{self.path}: the network {name} is missing from {RESERVED}/{NETWORKS}, so pictures made with it "
                "can't be rebuilt. Bring the file back from a backup of the store.",
                Problem.DAMAGED,
            ) from None
        if hashlib.sha256(data).digest() != sha256:
            raise StoreError(
                f"{self.path}: the network {name} in {RESERVED}/{NETWORKS} is damaged; it was not used. Bring the file "
                "back from a backup of the store.",
                Problem.DAMAGED,
            )
        return data

    def keep_network(self, data: bytes) -> bytes:
        """Keep a durable copy of a network's file in the store and return its sha256. Raises OSError."""
        digest = hashlib.sha256(data).digest()
        name = digest.hex()
        with contextlib.suppress(StoreError):
            self.network_bytes(digest)
            return digest
        write_durably(self.networks_fd, name, data, 0o600)
        return digest


def _read(directory: int, name: str) -> bytes:
    with os.fdopen(os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory), "rb") as file:
        return file.read()


def write_durably(directory: int, name: str, data: bytes, mode: int) -> None:
    """Put ``data`` under ``name``, whole or not at all, and fsync file and directory. Raises OSError."""
    temporary = f".{name}.{secrets.token_hex(4)}"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode, dir_fd=directory)
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise
    os.fsync(directory)


def host_id(store_id: str) -> str:
    """This machine's name within the store: 12 hex digits, which say nothing outside it."""
    try:
        with open("/etc/machine-id", "rb") as file:
            machine = file.read().strip()
    except OSError:
        machine = b""
    # The host's name tells containers and cloned machines apart that share a machine-id.
    seed = machine + b"\0" + os.fsencode(socket.gethostname())
    return hashlib.blake2s(seed, key=bytes.fromhex(store_id), person=b"esrfhost").hexdigest()[:12]


def boot_id() -> str:
    """The kernel's id for this boot, 12 hex digits."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip().replace("-", "")[:12]


def is_store(path: str, dir_fd: int | None = None) -> bool:
    """Whether a store lies at ``path`` (relative to ``dir_fd``). What this user may not look into counts as one."""
    try:
        os.lstat(os.path.join(path, RESERVED, CONFIG), dir_fd=dir_fd)
    except OSError as error:
        return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    return True


def read_config(path: str) -> StoreConfig:
    """The store.toml of the store at ``path``. Raises StoreError, OSError."""
    where = os.path.join(path, RESERVED, CONFIG)
    with open(where, encoding="utf-8", errors="replace") as file:
        return _config_of_any_version(file.read(), where)


def open_store(path: str, readonly: bool = False) -> Store:
    """Open the store at ``path``: the only time that a path is resolved.

    A store of a newer format version, or with feature flags that this version doesn't know, opens read-only whatever
    was asked (``Store.readonly`` tells). Raises StoreError.
    """
    opened: list[int] = []

    def directory(name: str, at: int | None = None) -> int:
        fd = os.open(name, _DIRECTORY if at is not None else _DIRECTORY & ~os.O_NOFOLLOW, dir_fd=at)
        opened.append(fd)
        return fd

    try:
        root_fd = directory(path)
        meta_fd = directory(RESERVED, root_fd)
        text = _read(meta_fd, CONFIG).decode("utf-8", "replace")
        config = _config_of_any_version(text, os.path.join(path, RESERVED, CONFIG))
        readonly = readonly or config.format_version > FORMAT_VERSION or bool(set(config.features) - KNOWN_FEATURES)
        host = host_id(config.id)
        if not readonly:
            readonly = not _make_directories(meta_fd, host)
        if readonly:
            _make_lost_directories(meta_fd)
        staging_fd = blobs_fd = -1
        with contextlib.suppress(FileNotFoundError):
            staging_fd = directory(f"{STAGING}/{host}", meta_fd)
        with contextlib.suppress(FileNotFoundError):
            blobs_fd = directory(BLOBS, meta_fd)
        return Store(
            path=path,
            config=config,
            readonly=readonly,
            root_fd=root_fd,
            meta_fd=meta_fd,
            ledger_fd=directory(LEDGER, meta_fd),
            originals_fd=directory(ORIGINALS, meta_fd),
            networks_fd=directory(NETWORKS, meta_fd),
            blobs_fd=blobs_fd,
            staging_fd=staging_fd,
            host=host,
            boot=boot_id(),
            session=secrets.token_hex(4),
        )
    except BaseException as error:
        for fd in opened:
            os.close(fd)
        if isinstance(error, FileNotFoundError) and error.filename in (LEDGER, ORIGINALS, NETWORKS):
            raise StoreError(
                f"{path} is an esrfs store that lacks the folder {RESERVED}/{error.filename} (some backups leave out "
                "empty folders), and it can't be made here. Make it, or copy the store to where it can be written.",
                Problem.DAMAGED,
            ) from error
        if isinstance(error, FileNotFoundError | NotADirectoryError):
            raise StoreError(
                f"{path} is not an esrfs store. Make it one with: esrfs init {path}", Problem.NOT_A_STORE
            ) from error
        if isinstance(error, PermissionError):
            raise StoreError(
                f"{path}: {error.strerror}: {error.filename}. A store can be opened by its owner and by root.",
                Problem.PERMISSION,
            ) from error
        raise


def _make_directories(meta_fd: int, host: str) -> bool:
    """Make what is missing, this host's staging directory at least. False on a read-only filesystem.

    All but store.toml may be: git, and backups that leave out empty folders, bring none of them back.
    """
    for name in (STAGING, LEDGER, ORIGINALS, NETWORKS, BLOBS, f"{STAGING}/{host}", f"{LEDGER}/{ledger.SETTLED}"):
        try:
            os.mkdir(name, 0o700, dir_fd=meta_fd)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno != errno.EROFS:
                raise
            return False
    return os.access(".", os.W_OK, dir_fd=meta_fd)


def _make_lost_directories(meta_fd: int) -> None:
    """What every look at a store relies on: a backup that left out empty folders is to be looked at, too."""
    for name in (LEDGER, ORIGINALS, NETWORKS):
        with contextlib.suppress(OSError):
            os.mkdir(name, 0o700, dir_fd=meta_fd)


def _config_of_any_version(text: str, where: str) -> StoreConfig:
    """As :func:`parse_config`; of a newer format's file only what every version has to have is asked."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        values = {}
    version = values.get("format_version")
    if not isinstance(version, int) or version <= FORMAT_VERSION:
        return parse_config(text, where)
    try:
        return StoreConfig(
            format_version=version,
            features=[],
            id=bytes.fromhex(values["id"]).hex(),
            key=bytes.fromhex(values["key"]).hex(),
            created=str(values.get("created", "")),
            exclusive=False,
            undo_days=0,
            policy=Policy(),
            probe=Probe(exchange=False, leases=False, links=False, xattrs=False, locks=False, fsync=False),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(
            f"{where} is of format {version}; this esrfs reads up to {FORMAT_VERSION}. Install a newer esrfs.",
            Problem.UNSUPPORTED,
        ) from error
