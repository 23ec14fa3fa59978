"""Is a store sound? Every blob, network, original and ledger is looked at; with ``deep`` every view is rebuilt, too.

Reads only. On a store that is mounted, files may change during the look; what is gone by then is no finding.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from esrfs.blob import container
from esrfs.blob.container import Blob, BlobDamaged, NotABlob
from esrfs.blob.recipe import Verbatim
from esrfs.engine.client import EngineError, Rebuilt
from esrfs.networks import registry
from esrfs.store import ledger, originals, staging
from esrfs.store.beneath import beneath
from esrfs.store.errors import StoreError
from esrfs.store.examine import is_damaged, may_be_blob
from esrfs.store.layout import NETWORKS, ORIGINALS, RESERVED, Store
from esrfs.store.ledger import Purged, ToPlain
from esrfs.store.unfinished import Unfinished
from esrfs.upkeep import networks, walk

Severity = Literal["damage", "note"]
Rebuild = Callable[[Blob], Rebuilt]
"""The view of a blob; raises EngineError, TimeoutError."""

_ADVICE = "The view of it can't be read: bring it back with `esrfs restore` or from a backup of the store"
_FILE_TYPE = slice(4, 8)
_PICTURES = (b"ftyp", b"JXL ")


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    severity: Severity
    """``damage``: something can't be read or is lost; ``note``: worth knowing, nothing is lost."""
    path: str
    """In the store; what begins with ``.esrfs/`` is not seen in the view."""
    problem: str
    """A stable identifier: ``blob_damaged``, ``network_missing`` …"""
    message: str
    """What is wrong and what to do, in a sentence or two."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of ``esrfs check --json``."""

    files: int
    blobs: int
    rebuilt: int
    """Views that were rebuilt (with ``deep``)."""
    findings: list[Finding]

    @property
    def is_sound(self) -> bool:
        return not any(finding.severity == "damage" for finding in self.findings)


def check(
    store: Store,
    rebuild: Rebuild | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, path: None,
) -> Report:
    """Look at everything in the store; with ``rebuild``, also rebuild each view and compare it with its recipe.

    ``on_progress(files looked at, files in all, path)``. Raises OSError when the store itself can't be read.
    """
    findings = [
        *_kept_networks(store),
        *_ledgers(store),
        *_originals(store, deep=rebuild is not None),
        *_staging(store),
    ]
    total = sum(1 for _ in walk.files(store, tell=lambda left_out: None))
    files = blobs = rebuilt = 0
    needed: dict[bytes, _Needed] = {}

    def tell(one: walk.LeftOut) -> None:
        findings.append(_left_out(one))

    for found in walk.files(store, tell=tell):
        files += 1
        on_progress(files, total, found.path)
        blob, problems = _look_at(store, found.path, needed)
        findings += problems
        blobs += blob is not None
        if blob is not None and rebuild is not None and not problems:
            rebuilt += 1
            findings += _view(found.path, blob, rebuild)
    findings += _lost_networks(needed)
    return Report(files=files, blobs=blobs, rebuilt=rebuilt, findings=findings)


def sample(store: Store, count: int) -> list[Finding]:
    """What is wrong with ``count`` blobs drawn at random; all of them where there are fewer. Rebuilds nothing, but a
    network that the store has lost and esrfs has is put back.

    Raises OSError when the store itself can't be read.
    """
    likely = [found.path for found in walk.files(store) if may_be_blob(found.st)]
    needed: dict[bytes, _Needed] = {}
    drawn = random.sample(likely, min(count, len(likely)))
    findings = [finding for path in drawn for finding in _look_at(store, path, needed)[1]]
    for sha256, network in needed.items():
        if network.elsewhere is not None:
            with contextlib.suppress(StoreError, OSError):
                networks.network_bytes(store, sha256)
                network.problem = None
    return [*findings, *_lost_networks(needed)]


@dataclass
class _Needed:
    """A network that blobs name."""

    name: str
    problem: str | None
    """Why the store's copy can't be used."""
    elsewhere: Path | None
    """The same file among esrfs's own networks, looked for if there is a problem."""
    blobs: int = 0


def _look_at(store: Store, path: str, needed: dict[bytes, _Needed]) -> tuple[Blob | None, list[Finding]]:
    """The blob at ``path``, None for another file or a damaged one; and what is wrong with it."""
    try:
        descriptor = beneath(store.root_fd, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None, []
    except OSError as error:
        return None, [_note(path, "unreadable", f"it can't be opened: {error}")]
    try:
        st = os.fstat(descriptor)
        genuine = _is_ours(store, descriptor, st)
        if genuine is None and is_damaged(store, descriptor, st):
            return None, [_damage(path, "blob_damaged", f"its footer is damaged. {_ADVICE}")]
        if genuine is None:
            return None, _moved_box(store, path, descriptor, st.st_size)
        data = _read_all(descriptor, st.st_size)
    except OSError as error:
        return None, [_damage(path, "unreadable", f"reading it fails: {error}")]
    finally:
        os.close(descriptor)
    return _blob(store, path, data, genuine, needed)


def _left_out(one: walk.LeftOut) -> Finding:
    if isinstance(one.error, PermissionError):
        return _note(one.path, "unreadable", f"{one.said}. It was not checked; its owner or root can")
    return _damage(one.path, "unreadable", f"{one.said}. Is the disk failing? It was not checked")


def _damage(path: str, problem: str, message: str) -> Finding:
    return Finding(severity="damage", path=path, problem=problem, message=message)


def _note(path: str, problem: str, message: str) -> Finding:
    return Finding(severity="note", path=path, problem=problem, message=message)


def _is_ours(store: Store, descriptor: int, st: os.stat_result) -> container.Footer | None:
    if not may_be_blob(st):
        return None
    return container.read_footer(descriptor, st.st_size, store.config.id_bytes, store.config.key_bytes)


def _moved_box(store: Store, path: str, descriptor: int, size: int) -> list[Finding]:
    """A blob that a program rewrote behind the mount: its box is there, and not where a mount looks for it."""
    if os.pread(descriptor, 12, 0)[_FILE_TYPE] not in _PICTURES:
        return []
    with contextlib.suppress(BlobDamaged, NotABlob):
        footer = container.find_by_walk(descriptor, size)
        if footer is not None and footer.genuine(store.config.id_bytes, store.config.key_bytes):
            return [
                _note(
                    path,
                    "box_moved",
                    "a program that does not know esrfs rewrote this blob in the store, so the view shows the small "
                    "picture that it is. Bring the file back from a backup, or keep it as it is",
                )
            ]
    return []


def _blob(
    store: Store, path: str, data: bytes, footer: container.Footer, needed: dict[bytes, _Needed]
) -> tuple[Blob | None, list[Finding]]:
    try:
        blob = container.unpack(data)
    except (BlobDamaged, NotABlob) as error:
        return None, [_damage(path, "blob_damaged", f"{error}. {_ADVICE}")]
    recipe = blob.recipe
    if recipe.original_size != footer.view_size:
        sizes = f"{footer.view_size} bytes, its recipe one of {recipe.original_size}"
        return blob, [_damage(path, "blob_damaged", f"its footer promises a view of {sizes}. {_ADVICE}")]
    if blob.avif[_FILE_TYPE] not in _PICTURES and not isinstance(recipe.coding, Verbatim):
        return blob, [_damage(path, "blob_damaged", f"its picture is neither AVIF nor JPEG XL. {_ADVICE}")]
    digest = recipe.network_sha256
    if digest:
        if digest not in needed:
            needed[digest] = _Needed(recipe.network, *_network_problem(store, digest))
        network = needed[digest]
        network.blobs += 1
        if network.problem is not None and network.elsewhere is None:
            message = (
                f"its network {network.name} ({digest.hex()[:16]}) can't be used. {_ADVICE}, or the network itself"
            )
            return blob, [_damage(path, "network_missing", message)]
    return blob, []


def _network_problem(store: Store, sha256: bytes) -> tuple[str | None, Path | None]:
    """Why the store's copy can't be used, None if it can; and where else the same file is."""
    try:
        store.network_bytes(sha256)
    except (StoreError, OSError) as error:
        found = registry.with_sha256(sha256)
        return str(error), found[0] if found is not None else None
    return None, None


def _lost_networks(needed: dict[bytes, _Needed]) -> Iterator[Finding]:
    """One finding for each network, beside those of the blobs."""
    for sha256, network in needed.items():
        if network.problem is None:
            continue
        place = f"{RESERVED}/{NETWORKS}/{sha256.hex()}"
        who = f"{network.blobs} {'blob needs' if network.blobs == 1 else 'blobs need'} the network {network.name}"
        if network.elsewhere is None:
            yield _damage(place, "network_missing", f"{who}, and esrfs does not have it either: {network.problem}")
        else:
            message = f"{who}. The store has lost it, but {network.elsewhere} is the same file; a mount puts it back"
            yield _note(place, "network_elsewhere", message)


def _view(path: str, blob: Blob, rebuild: Rebuild) -> list[Finding]:
    recipe = blob.recipe
    try:
        rebuilt = rebuild(blob)
    except (EngineError, TimeoutError) as error:
        return [_damage(path, "rebuild_failed", f"its view can't be rebuilt: {error}")]
    digest = hashlib.sha256()
    for chunk in rebuilt.file.chunks():
        digest.update(chunk)
    if len(rebuilt.file) != recipe.original_size or digest.digest() != rebuilt.sha256:
        return [_damage(path, "rebuild_failed", "the engine's answer is not a view of the promised size")]
    if rebuilt.sha256 != recipe.sha256_view:
        return [
            _note(
                path,
                "inexact",
                f"its view was rebuilt, but not byte for byte as when it was made ({recipe.encoder}): this machine's "
                "hardware or libraries differ",
            )
        ]
    return []


def _kept_networks(store: Store) -> Iterator[Finding]:
    for name in sorted(os.listdir(store.networks_fd)):
        if name.startswith("."):
            continue  # on its way in
        try:
            digest = bytes.fromhex(name)
        except ValueError:
            yield _note(f"{RESERVED}/{NETWORKS}/{name}", "unknown_file", "esrfs did not put this file here")
            continue
        problem, elsewhere = _network_problem(store, digest)
        if problem is not None and elsewhere is None:
            yield _damage(f"{RESERVED}/{NETWORKS}/{name}", "network_damaged", problem)
        elif problem is not None:
            message = f"it is damaged, but {elsewhere} is the file that it was; a mount puts it back when it is needed"
            yield _note(f"{RESERVED}/{NETWORKS}/{name}", "network_damaged", message)


def _ledgers(store: Store) -> Iterator[Finding]:
    """Damaged lines, steps that wait for recovery, and originals that should be in the window and are not."""
    there = set(os.listdir(store.originals_fd))
    steps: list[ledger.Intent] = []
    done: set[str] = set()
    gone: set[str] = set()
    restored: set[str] = set()
    for name, reading in readings(store):
        where = f"{RESERVED}/ledger/{name}"
        if reading.damaged:
            yield _damage(where, "ledger_damaged", f"{reading.damaged} lines of it don't fit their checksums")
        pending = ledger.pending(reading.records)
        if pending and not _writer_lives(store, name):
            host = os.path.basename(name).partition("-")[0]
            if host == store.host:
                message = "a step was interrupted; mounting the store finishes it or takes it back"
                yield _note(where, "unfinished", message)
            else:
                yield from (_note(where, "unfinished", _elsewhere(Unfinished(host, step))) for step in pending)
        for record in reading.records:
            if isinstance(record, ledger.Intent):
                steps.append(record)
            elif isinstance(record, ledger.Done):
                done.add(record.job)
            elif isinstance(record, Purged):
                gone.add(record.name)
            elif isinstance(record, ToPlain) and record.purpose == "restore":
                restored.add(record.sha256_plain)
    for step in steps:
        lost = step.job in done and step.kept not in there and step.kept not in gone
        if lost and step.sha256_original not in restored:
            yield _damage(
                f"{RESERVED}/{ORIGINALS}/{step.kept}",
                "original_missing",
                f"the original of {ledger.unquote(step.path)} left the undo window, and not by esrfs",
            )


def _elsewhere(one: Unfinished) -> str:
    path = ledger.unquote(one.step.path) or "a file"
    if isinstance(one.step, ledger.Intent):
        rest = f"its original may lie in {one.held}; `esrfs restore` brings it back from there, on any machine"
    else:
        rest = f"what belongs under its name may lie, complete, in {one.held}; copy it from there if {path} is damaged"
    return (
        f"a step for {path} was interrupted on another machine, or on this one when it had another name. Mounting the "
        f"store there ends it. Until then, and if that machine is gone, {rest}"
    )


def readings(store: Store) -> Iterator[tuple[str, ledger.Reading]]:
    """Every ledger, by its path below ``ledger/``."""
    for folder in ("", ledger.SETTLED):
        try:
            directory = beneath(store.ledger_fd, folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            for name in sorted(os.listdir(directory)):
                if name in (ledger.SETTLED, ledger.DAYS):
                    continue
                with contextlib.suppress(FileNotFoundError):  # its process ended, and it moved to settled/
                    descriptor = beneath(directory, name, os.O_RDONLY | os.O_NOFOLLOW)
                    try:
                        yield os.path.join(folder, name), ledger.read_fd(descriptor)
                    finally:
                        os.close(descriptor)
        finally:
            os.close(directory)


def _writer_lives(store: Store, name: str) -> bool:
    try:
        descriptor = beneath(store.ledger_fd, name, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        ledger.lock(descriptor)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _originals(store: Store, *, deep: bool) -> Iterator[Finding]:
    for kept in sorted(originals.entries(store), key=lambda kept: kept.name):
        where = f"{RESERVED}/{ORIGINALS}/{kept.name}"
        try:
            if originals.is_changed(store, kept):
                yield _note(where, "original_changed", "a program wrote to it after compaction; it will not be purged")
            elif deep:
                os.close(originals.open_verified(store, kept))
        except FileNotFoundError:
            continue
        except PermissionError as error:
            yield _note(where, "unreadable", f"it can't be opened: {error.strerror}. Its owner or root can")
        except OSError as error:
            yield _damage(where, "unreadable", f"reading it fails: {error.strerror}; while it is so it is not purged")
        except ValueError:
            yield _damage(where, "original_damaged", "its content is not what was put there")
    for name in originals.found(store):
        yield _note(
            f"{RESERVED}/{ORIGINALS}/{name}",
            "put_aside",
            "recovery could not account for this file and kept it; look at it, then move it where it belongs",
        )


def _staging(store: Store) -> Iterator[Finding]:
    if store.staging_fd < 0:
        return
    for staged in staging.entries(store):
        if not staged.kind:
            yield _note(f"{RESERVED}/staging/{store.host}/{staged.name}", "unknown_file", "esrfs did not put it here")


def _read_all(descriptor: int, size: int) -> bytes:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        file.seek(0)
        return file.read(size)
