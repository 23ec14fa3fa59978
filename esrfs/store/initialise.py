"""``esrfs init``: make a directory a store, where it stands or (``in_place``) with the view in its old place.

A crash at any point leaves the photographs where they were or all of them in the new place, never some of them. The
order: ``.esrfs.new/`` is built completely → renamed to ``.esrfs`` (from here on it is a store) → an empty, unwritable
directory is made under the new name ``.NAME.esrfs`` → the two names are exchanged. Repeating the command goes on from
wherever a crash left off.
"""

from __future__ import annotations

import contextlib
import datetime
import operator
import os
import random
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from esrfs import faults
from esrfs.compaction.outcome import Outcome, Policy, Verdict, stored_bytes
from esrfs.formats.identify import HEAD_BYTES, identify
from esrfs.formats.kinds import COMPACTED
from esrfs.store import exchange, layout, ledger
from esrfs.store.errors import Problem, StoreError
from esrfs.store.layout import RESERVED, StoreConfig
from esrfs.store.mountpoint import open_mountpoint, protect_mountpoint
from esrfs.store.probe import probe

FAULT_POINTS = ("init.begin", "init.built", "init.store", "init.mountpoint", "init.exchanged", "init.done")

_NEW = ".esrfs.new"
SMALLEST_CANDIDATE = 4096
"""Bytes: smaller files are not reckoned with."""
SAMPLE = 32
"""Files that a prediction tries: enough for a saving that is less than 15 % off (``benchmarks.ratios``)."""


@dataclass(frozen=True)
class Initialised:
    store: str
    """Where the store is."""
    mountpoint: str
    """``in_place``: the empty directory that the store's view should be mounted on; else empty."""
    config: StoreConfig
    warnings: list[str]
    """For people."""


def init(
    path: str, *, in_place: bool = False, exclusive: bool = False, policy: Policy | None = None, undo_days: int = 30
) -> Initialised:
    """Make the directory at ``path`` a store; without ``in_place`` it is made if it is missing.

    Raises StoreError for a directory that must not become one, and when something is in the way; OSError.
    """
    path = os.path.realpath(path)
    policy = Policy() if policy is None else policy
    faults.reach("init.begin")
    if in_place:
        return _init_in_place(path, exclusive, policy, undo_days)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o777)
    config = _make_store(path, exclusive, policy, undo_days)
    faults.reach("init.done")
    return Initialised(path, "", config, _warnings(config))


def _init_in_place(path: str, exclusive: bool, policy: Policy, undo_days: int) -> Initialised:
    above, name = os.path.split(path)
    if not name:
        raise StoreError("The root directory can't be a store.", Problem.REFUSED)
    moved = os.path.join(above, f".{name}.esrfs")
    if layout.is_store(moved) and not os.path.lexists(path):
        # An earlier init, on a filesystem without exchange, ended between its rename and its mkdir.
        _make_mountpoint(path, like=moved)
    if layout.is_store(moved) and os.path.isdir(path) and not os.listdir(path):
        protect_mountpoint(path)
        config = layout.read_config(moved)
        return Initialised(moved, path, config, _warnings(config))
    if not os.path.isdir(path):
        raise StoreError(f"{path} is not a directory; there is nothing to make a store of.", Problem.NOT_FOUND)
    if os.path.ismount(path):
        raise StoreError(
            f"{path} is a mountpoint, which can't be renamed. Make a directory in it the store, or use: "
            f"esrfs init {path} and mount the view elsewhere.",
            Problem.REFUSED,
        )
    if os.path.lexists(moved) and (os.path.islink(moved) or not os.path.isdir(moved) or os.listdir(moved)):
        raise StoreError(
            f"{moved} is in the way: the store would be moved there. Nothing was changed. Move it away.", Problem.BUSY
        )
    if layout.is_store(path):
        refuse_unsuitable(path, allow_itself=True)
        config = layout.read_config(path)
    else:
        config = _make_store(path, exclusive, policy, undo_days)
    if config.probe.exchange:
        _make_mountpoint(moved, like=path)
        faults.reach("init.mountpoint")
        with _open_directory(above) as directory:
            exchange.exchange(directory, os.path.basename(moved), directory, name)
            faults.reach("init.exchanged")
            os.fsync(directory)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(moved)
        os.rename(path, moved)
        faults.reach("init.mountpoint")
        _make_mountpoint(path, like=moved)
        faults.reach("init.exchanged")
    # Last, since an immutable directory can't be renamed.
    protect_mountpoint(path)
    faults.reach("init.done")
    return Initialised(moved, path, config, _warnings(config))


def _make_mountpoint(path: str, like: str) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o555)
    os.chmod(path, 0o555)
    st = os.stat(like)
    if (st.st_uid, st.st_gid) != (os.geteuid(), os.getegid()):
        with contextlib.suppress(PermissionError):
            os.chown(path, st.st_uid, st.st_gid)


@contextlib.contextmanager
def _open_directory(path: str) -> Iterator[int]:
    fd = open_mountpoint(path)
    try:
        yield fd
    finally:
        os.close(fd)


def _make_store(path: str, exclusive: bool, policy: Policy, undo_days: int) -> StoreConfig:
    refuse_unsuitable(path)
    new = os.path.join(path, _NEW)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(new)  # of an init that was cut short: it held no more than is made again now
    os.mkdir(new, 0o700)
    for name in (layout.STAGING, layout.LEDGER, layout.ORIGINALS, layout.NETWORKS, layout.BLOBS):
        os.mkdir(os.path.join(new, name), 0o700)
    os.mkdir(os.path.join(new, layout.LEDGER, ledger.SETTLED), 0o700)
    with _open_directory(new) as directory:
        found = probe(directory)
        config = StoreConfig(
            format_version=layout.FORMAT_VERSION,
            features=[],
            id=secrets.token_hex(16),
            key=secrets.token_hex(32),
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            exclusive=exclusive,
            undo_days=undo_days,
            policy=policy,
            probe=found,
        )
        layout.parse_config(layout.format_config(config), path)  # refuses a policy that open_store would refuse
        layout.write_durably(directory, layout.CONFIG, layout.format_config(config).encode(), 0o600)
    faults.reach("init.built")
    with _open_directory(path) as directory:
        st = os.fstat(directory)
        if (st.st_uid, st.st_gid) != (os.geteuid(), os.getegid()) and os.geteuid() == 0:
            _give_to(new, st.st_uid, st.st_gid)  # root makes a store for somebody: it is theirs
        os.rename(_NEW, RESERVED, src_dir_fd=directory, dst_dir_fd=directory)
        os.fsync(directory)
    faults.reach("init.store")
    return config


def _give_to(tree: str, uid: int, gid: int) -> None:
    for top, _, files in os.walk(tree):
        for each in (top, *(os.path.join(top, name) for name in files)):
            os.chown(each, uid, gid, follow_symlinks=False)


def _warnings(config: StoreConfig) -> list[str]:
    found = config.probe
    warnings = []
    missing = [what for what, there in (("atomic exchange", found.exchange), ("leases", found.leases)) if not there]
    if missing and not config.exclusive:
        warnings.append(
            f"This filesystem has no {' and no '.join(missing)}, so nothing is compacted yet. If only esrfs writes in "
            "the store, say so: esrfs init --exclusive, or exclusive = true in store.toml."
        )
    elif not found.exchange and not found.links:
        warnings.append("This filesystem has neither atomic exchange nor hard links, so nothing can be compacted here.")
    if not found.xattrs:
        warnings.append("This filesystem has no extended attributes; files keep none.")
    if not found.fsync:
        warnings.append("fsync fails on this filesystem: after a power failure, recent files may be lost.")
    return warnings


# ---- what must not become a store


def refuse_unsuitable(path: str, *, allow_itself: bool = False) -> None:
    """Raise StoreError if ``path`` is, holds or lies in a store or view, or a tree that another program mirrors or
    addresses.

    Walks the whole tree below ``path`` (names only). ``allow_itself``: ``path`` may be a store already.
    """
    if is_view(path):
        raise StoreError(
            f"{path} is the view of a store. Make the store itself elsewhere; nothing was changed.", Problem.REFUSED
        )
    above = os.path.dirname(path)
    while True:
        reason = what_marks(above, _names(above))
        if reason:
            raise StoreError(f"{path} lies in {above}, {reason} Nothing was changed.", Problem.REFUSED)
        if above == os.path.dirname(above):
            break
        above = os.path.dirname(above)
    for top, directories, files in os.walk(path, onerror=_raise):
        names = {*directories, *files}
        if top == path and allow_itself:
            names.discard(RESERVED)
        reason = what_marks(top, names)
        if reason:
            where = f"{path} is" if top == path else f"{path} holds {top},"
            raise StoreError(f"{where} {reason} Nothing was changed.", Problem.REFUSED)
        if top == path:
            directories[:] = [name for name in directories if name not in (RESERVED, _NEW)]


def _raise(error: OSError) -> None:
    raise error


def _names(directory: str) -> set[str]:
    try:
        return set(os.listdir(directory))
    except OSError:
        return set()


_OWN_SYNC = re.compile(r"\._?sync_[0-9a-f]+\.db")
"""The journal of Nextcloud's and ownCloud's desktop clients, at the root of each folder that they mirror."""


def what_marks(directory: str, names: set[str]) -> str | None:
    """Why files in and below ``directory`` must stay as they are, as the end of "X is …"; None if nothing says so."""
    if RESERVED in names and layout.is_store(directory):
        return "an esrfs store already. Mount that one, or choose a directory outside it."
    if ".git" in names and os.path.isdir(os.path.join(directory, ".git", "annex")):
        return (
            "a git-annex repository, which knows files by their content: compacted ones would fail its checks. Make a "
            "store of a folder outside it, and annex the originals."
        )
    if "annex" in names and os.path.isdir(os.path.join(directory, "annex", "objects")) and "HEAD" in names:
        return "a bare git-annex repository, which knows files by their content. Make a store of a folder outside it."
    if ".stfolder" in names:
        return (
            "a folder of Syncthing: rebuilt pictures would replace the originals on your other devices. Remove it from "
            "Syncthing first, or let Syncthing send only, from a copy."
        )
    if ".nextcloudsync.log" in names or ".owncloudsync.log" in names or any(map(_OWN_SYNC.fullmatch, names)):
        return (
            "mirrored by Nextcloud or ownCloud: rebuilt pictures would replace the originals on your other devices. "
            "Remove the folder from its client first, or make a store of a copy."
        )
    if ".dropbox.cache" in names or ".dropbox" in names:
        return (
            "mirrored by Dropbox: rebuilt pictures would replace the originals on your other devices. Use a folder "
            "outside Dropbox."
        )
    if {"config", "data", "index", "keys", "snapshots"} <= names:
        return "a restic repository: its files are backups, known by their content. Keep it outside any store."
    if {"config", "data", "README"} <= names and _is_borg(directory):
        return "a borg repository: its files are backups, known by their content. Keep it outside any store."
    return None


def _is_borg(directory: str) -> bool:
    try:
        with open(os.path.join(directory, "config"), encoding="utf-8", errors="replace") as file:
            text = file.read(4096)
    except OSError:
        return False
    return "[repository]" in text and "id =" in text


def is_view(path: str) -> bool:
    """Whether ``path`` lies on a mounted view."""
    try:
        device = os.stat(path).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.readlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    return any(line.split()[2] == number and " - fuse.esrfs " in line for line in lines)


# ---- what would it save?


@dataclass(frozen=True)
class Predicted:
    """Under one preset."""

    compacted: int
    """Files of the sample that would become blobs."""
    bytes: int
    """What the whole folder would take."""


@dataclass(frozen=True)
class Prediction:
    files: int
    bytes: int
    candidates: int
    """Files of a kind that compaction knows."""
    candidate_bytes: int
    sampled: int
    """Candidates that were compacted, as a trial."""
    presets: dict[str, Predicted]


def predict(
    path: str,
    compact: Callable[[bytes, str], Outcome],
    presets: Sequence[str],
    *,
    sample: int = SAMPLE,
    progress: Callable[[int, int], None] | None = None,
) -> Prediction:
    """What the files below ``path`` would take as a store, by compacting up to ``sample`` of them under each preset
    (nothing is written).

    ``compact`` is the engine's, of an original and a preset. The sample is drawn by chance, larger files more likely,
    the same for the same folder. ``progress(done, total)`` is called after each trial. Raises StoreError as
    :func:`init` would, OSError.
    """
    path = os.path.realpath(path)
    refuse_unsuitable(path)
    files = list(_files(path))
    candidates = [(name, size) for name, size in files if size >= SMALLEST_CANDIDATE and _looks_compactable(name)]
    chosen = draw(candidates, sample)
    shares: dict[str, list[float]] = {preset: [] for preset in presets}
    compacted = dict.fromkeys(presets, 0)
    weights: list[float] = []
    for number, (name, size, weight) in enumerate(chosen, 1):
        try:
            with open(name, "rb") as file:
                original = file.read()
        except OSError:
            continue  # gone since, or not readable: it would stay as it is
        weights.append(weight)
        for position, preset in enumerate(presets):
            outcome = compact(original, preset)
            stored = size
            if outcome.verdict is Verdict.COMPACTED:
                stored = stored_bytes(outcome.avif, outcome.recipe)
                compacted[preset] += 1
            shares[preset].append(stored / size)
            if progress is not None:
                progress((number - 1) * len(presets) + position + 1, len(chosen) * len(presets))
    total, candidate_bytes = sum(size for _, size in files), sum(size for _, size in candidates)
    unknown = candidate_bytes - sum(weights)  # of what could not be read
    predicted = {
        preset: Predicted(
            compacted[preset],
            round(total - candidate_bytes + unknown + sum(map(operator.mul, weights, shares[preset]))),
        )
        for preset in presets
    }
    return Prediction(len(files), total, len(candidates), candidate_bytes, len(weights), predicted)


def draw(candidates: list[tuple[str, int]], count: int, seed: int = 0) -> list[tuple[str, int, float]]:
    """At most ``count`` files, each with its size and the bytes that it stands for: in all, those of all candidates.

    Sampling with probability proportional to size (systematic, in order of size): bytes are asked for, and a few large
    files hold most of them. Those that hold more than their part stand for themselves.
    """
    rest = sorted(candidates, key=lambda each: (each[1], each[0]))
    certain: list[tuple[str, int, float]] = []
    while rest and len(certain) < count and rest[-1][1] * (count - len(certain)) >= sum(size for _, size in rest):
        name, size = rest.pop()
        certain.append((name, size, float(size)))
    if not rest:
        return certain
    left = count - len(certain)
    step = sum(size for _, size in rest) / left
    begin = random.Random(seed).random()
    marks = [(number + begin) * step for number in range(left)]
    drawn: list[tuple[str, int, float]] = []
    end = 0
    for name, size in rest:
        end += size
        hits = sum(end - size <= mark < end for mark in marks)
        if hits:
            drawn.append((name, size, hits * step))
    return certain + drawn


def _files(path: str) -> Iterator[tuple[str, int]]:
    for top, directories, names in os.walk(path):
        directories.sort()
        for name in sorted(names):
            full = os.path.join(top, name)
            with contextlib.suppress(OSError):
                st = os.lstat(full)
                if stat.S_ISREG(st.st_mode):
                    yield full, st.st_size


def _looks_compactable(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            return identify(file.read(HEAD_BYTES)) in COMPACTED
    except OSError:
        return False
