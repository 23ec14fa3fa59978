"""Compaction of one file: is it at rest and worth a try, what does the engine say, and the swap.

The engine computes (original's bytes, policy, network → blob or verdict) and touches nothing; ``store.swap`` alone
changes the store. What happens to the file meanwhile is noticed by one of: the claim (this mount), the lease (this
host), or the file's identity at the swap (any host).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from esrfs import __version__, faults
from esrfs.blob import container, reference
from esrfs.blob.recipe import Recipe, decode, expand
from esrfs.compaction.outcome import LOSSLESS, NEVER, Outcome, Policy, Reason, Verdict
from esrfs.engine import filevalue
from esrfs.engine.client import Engine, EngineError, Ticket
from esrfs.engine.filevalue import FileValue
from esrfs.engine.protocol import Lane
from esrfs.formats.identify import HEAD_BYTES, identify
from esrfs.formats.kinds import COMPACTED
from esrfs.networks import registry
from esrfs.store import linux, swap
from esrfs.store.beneath import open_parent
from esrfs.store.catalog import BLOCKED, Catalog, Entry
from esrfs.store.errors import StoreError
from esrfs.store.examine import BlobInfo, examine, recipe_of
from esrfs.store.identity import Identity
from esrfs.store.layout import Store
from esrfs.store.rules import Rules
from esrfs.store.swap import SwapResult, SwapStatus
from esrfs.upkeep import homecoming
from esrfs.upkeep.asked_back import AskedBack
from esrfs.upkeep.claims import Claim, Claims

log = logging.getLogger("esrfs.upkeep")

_TEMPORARY = re.compile(
    r"""
    .*\.(part|partial|crdownload|download|tmp|temp|swp|swx|lock)   # browsers, editors
    | \.goutputstream-.* | \.~lock\..* | \.\#.* | .*~ | \#.*\#     # GNOME, LibreOffice, Emacs
    | \..+\.[A-Za-z0-9]{6}                                         # rsync: .name.XXXXXX
    | \.syncthing\..* | \.trashed-.* | \.pending-.*
    """,
    re.VERBOSE | re.IGNORECASE,
)
_LARGEST = 1 << 30
"""Bytes: no camera writes larger files of these kinds, and the engine holds an original in memory."""
_POLL_SECONDS = 0.1
_ENDS = 2
"""So often may the engine, or the mount with it, end with a file in its hands; then the file is left alone."""
BROUGHT_BACK = "it was brought back from the undo window"
_Answer = TypeVar("_Answer")
_SETTLED = (Verdict.REFUSED, Verdict.PASSED_THROUGH, "original")
"""States in the catalog that stand until somebody names the file; ``original``: brought back from the undo window."""


@dataclass(frozen=True)
class Done:
    """What became of one file. ``state``: compacted, refused, passed_through, blob (already), original (asked back), or
    left: it was busy, or changed meanwhile, and is worth another try later."""

    path: str
    state: str
    reason: str = ""
    message: str = ""
    original_bytes: int = 0
    stored_bytes: int = 0
    tried: bool = False
    """This comes of what the engine has just said (or that it ended); else it was known before, or seen without."""
    blocked_by: Literal["", "file", "folder"] = ""
    """Left for a reason that stays until somebody does something about the file, or about its folder."""


class CompactionUnavailable(Exception):  # noqa: N818 (a state of the store rather than an error)
    """The store's filesystem offers no safe swap; the message says what the owner can do."""


def is_temporary(name: str) -> bool:
    """Whether programs give such names to files that they have not finished."""
    return _TEMPORARY.fullmatch(name) is not None


def check_available(store: Store) -> None:
    """Raises CompactionUnavailable where a swap could overwrite somebody's work, or the store is read-only."""
    if store.readonly:
        raise CompactionUnavailable(f"{store.path} is open read-only, so nothing is compacted")
    if swap.swap_mode(store.config) is None:
        missing = "atomic exchange" if not store.config.probe.exchange else "leases"
        raise CompactionUnavailable(
            f"{store.path}: its filesystem has no {missing}, so a file that another program changes at the same moment "
            "could be lost; nothing is compacted. If only esrfs writes there, say so: esrfs init --exclusive"
        )


@dataclass(frozen=True)
class Workshop:
    """What compaction of any file of a store needs."""

    store: Store
    engine: Engine
    catalog: Catalog
    claims: Claims
    lease_held: Callable[[], bool]

    @functools.cached_property
    def asked_back(self) -> AskedBack:
        return AskedBack(self.store)

    @functools.cached_property
    def rules(self) -> Rules:
        return Rules(self.store)

    def may_be_compacted(self, path: str, identity: Identity) -> bool:
        """Whether the file with this path and content is worth a try: nothing is known of it, or a refusal that was
        made under another policy than its present one, or, where the engine ended, by another version of esrfs. Raises
        OSError, StoreError for rules that can't be read."""
        known = self.catalog.get(identity)
        if known is not None and known.reason == Reason.ENGINE_ENDED:
            return known.choice != __version__
        return (
            known is None
            or known.state == BLOCKED
            or bool(known.choice and known.choice != self.rules.decide(path).choice)
        )


def compact(workshop: Workshop, path: str, *, again: bool = False) -> Done:
    """Compact the file at ``path``, if that is right for it. ``again``: also when an earlier verdict was against it.

    Raises OSError for trouble with the store (full, failing), EngineError and TimeoutError for trouble with the engine,
    WeightsError when none of the policy's networks is installed; trouble with the file is a verdict.
    """
    store = workshop.store
    with open_parent(store.root_fd, path) as (directory, name):
        try:
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except FileNotFoundError:
            return Done(path, "left", message="it is gone")
        except PermissionError:
            return Done(path, "left", message="it may not be read", blocked_by="file")
        try:
            return _compact_open(workshop, path, descriptor, directory=directory, name=name, again=again)
        finally:
            os.close(descriptor)


def acquit(workshop: Workshop, path: str) -> None:
    """Take back the verdict that the engine ended while the file at ``path`` was compacted; nothing happens if it has
    no such verdict, or is gone."""
    with contextlib.suppress(OSError), open_parent(workshop.store.root_fd, path) as (directory, name):
        identity = Identity.from_stat(os.stat(name, dir_fd=directory, follow_symlinks=False))
        known = workshop.catalog.get(identity)
        if known is not None and known.reason == Reason.ENGINE_ENDED:
            workshop.catalog.forget(identity)


def _compact_open(workshop: Workshop, path: str, descriptor: int, *, directory: int, name: str, again: bool) -> Done:
    st = os.fstat(descriptor)
    if not stat.S_ISREG(st.st_mode):
        return Done(path, "left", message="it is no regular file")
    identity = Identity.from_stat(st)
    known = workshop.catalog.get(identity)
    blob = examine(workshop.store, descriptor, st)
    if blob is not None:
        if known is None:
            workshop.catalog.put(identity, _entry_of(path, descriptor, st, blob))
        return Done(path, "blob")
    try:
        policy = workshop.rules.policy(path)
        settled = known is not None and known.state in _SETTLED and not workshop.may_be_compacted(path, identity)
    except StoreError as error:
        return Done(path, "left", message=str(error))
    if known is not None and settled and not again:
        return Done(path, known.state, known.reason, known.message, st.st_size, st.st_blocks * 512)
    verdict = _verdict_before_reading(name, descriptor, st)
    if verdict is not None:
        return _remember(workshop, path, st, verdict)
    if policy is None:
        rule = workshop.rules.decide(path).rule
        line = f" (line {rule.line})" if rule else ""
        return _remember(workshop, path, st, _refusal(Reason.NEVER, f"a rule of this store says so{line}"), NEVER)
    if workshop.catalog.ends(identity) >= _ENDS and not again:
        # The mount ended with the engine each time (its unit had no memory left?), so there is no verdict yet.
        log.warning("%s: esrfs ended while this was compacted, more than once; it stays as it is", path)
        workshop.catalog.set_ends(identity, 0)
        return _remember(workshop, path, st, _ended_with_it("esrfs"), __version__)
    obstacle = swap.folder_obstacle(workshop.store, directory)
    if obstacle:
        return _remember_blocked(workshop, path, st, obstacle, "folder")
    if linux.keeps_its_name(descriptor):
        return _remember_blocked(
            workshop, path, st, "it is marked immutable or append-only (lsattr), so no blob can take its name", "file"
        )
    try:
        with linux.read_lease(descriptor):
            pass
    except BlockingIOError:
        return Done(path, "left", message="a program has it open for writing")
    except linux.LeasesUnavailable:
        if not workshop.store.config.exclusive:
            return _remember_blocked(workshop, path, st, "no lease is granted on it", "file")
    claim = workshop.claims.take((st.st_dev, st.st_ino))
    if claim is None:
        return Done(path, "left", message="it is in use")
    try:
        return _compact_claimed(workshop, path, descriptor, st, claim, policy=policy, again=again)
    finally:
        workshop.claims.end(claim)


def _verdict_before_reading(name: str, descriptor: int, st: os.stat_result) -> Outcome | None:
    if st.st_nlink > 1:
        return _refusal(Reason.HARD_LINKS, f"it has {st.st_nlink} hard links, which a blob would part")
    if is_temporary(name):
        return _refusal(Reason.TEMPORARY_NAME, "its name says that it is not finished")
    kind = identify(os.pread(descriptor, HEAD_BYTES, 0))
    if not kind:
        return _as_it_is(Reason.NOT_A_PICTURE, "it is no picture that esrfs knows")
    if kind not in COMPACTED:
        return _as_it_is(Reason.UNSUPPORTED_KIND, f"files of kind {kind} are kept as they are", kind)
    if st.st_size > _LARGEST:
        return _as_it_is(Reason.TOO_LARGE, "it is larger than 1 GiB", kind)
    return None


def _refusal(reason: Reason, message: str) -> Outcome:
    return Outcome(verdict=Verdict.REFUSED, reason=reason, message=message)


def _ended_with_it(who: str) -> Outcome:
    message = f"{who} ended while it was compacted, more than once"
    again = "another version of esrfs tries again, or `esrfs compact --now --wait FILE`"
    return _refusal(Reason.ENGINE_ENDED, f"{message}; {again}")


def _as_it_is(reason: Reason, message: str, kind: str = "") -> Outcome:
    return Outcome(verdict=Verdict.PASSED_THROUGH, reason=reason, message=message, kind=kind)


def _compact_claimed(
    workshop: Workshop, path: str, descriptor: int, st: os.stat_result, claim: Claim, *, policy: Policy, again: bool
) -> Done:
    identity = Identity.from_stat(st)
    sha256 = _digest(descriptor, st.st_size)
    if sha256 is None or Identity.from_stat(os.fstat(descriptor)) != identity:
        return Done(path, "left", message="it changed while it was read")
    faults.reach("compact.read")
    if not again and workshop.asked_back.holds(sha256):
        return _remember_original(workshop, path, st)
    known = homecoming.recognise(workshop.store, workshop.catalog, descriptor, st.st_size)
    if known is not None and known.trusted:
        return _apply(workshop, path, descriptor, st, known.outcome, claim=claim, policy=policy, sha256=sha256)

    def ask() -> Outcome | None:
        if known is not None and _rebuilds(workshop, known.outcome, claim, policy):
            return known.outcome
        return _ask_engine(workshop, filevalue.of_descriptor(descriptor, st.st_size), claim, policy)

    outcome = _counting_ends(workshop.catalog, identity, ask)
    if outcome is None:
        return Done(path, "left", message="a program began to use it")
    done = _apply(workshop, path, descriptor, st, outcome, claim=claim, policy=policy, sha256=sha256)
    return replace(done, tried=True)


def _counting_ends(catalog: Catalog, identity: Identity, ask: Callable[[], Outcome | None]) -> Outcome | None:
    """What ``ask`` gives, or a refusal when the engine has ended with this file in its hands too often.

    The count is raised before anything else, since the mount itself may end with the engine; then nobody is there to do
    it, and the next mount would begin with the same file.
    """
    before = ends = catalog.ends(identity)
    catalog.set_ends(identity, before + 1)
    try:
        outcome = ask()
        ends = before if outcome is None else 0
    except EngineError as error:
        ends = before + error.ends
        if not error.ends or ends < _ENDS:
            raise
        ends = 0  # from here on the verdict tells
        return _ended_with_it("the engine")
    finally:
        catalog.set_ends(identity, ends)
    return outcome


def _apply(
    workshop: Workshop,
    path: str,
    descriptor: int,
    st: os.stat_result,
    outcome: Outcome,
    *,
    claim: Claim,
    policy: Policy,
    sha256: bytes,
) -> Done:
    """Do with the file as the outcome says. ``sha256``: of the file, before its outcome was asked for."""
    store, identity = workshop.store, Identity.from_stat(st)
    # The engine was sent the file after it was hashed.
    if Identity.from_stat(os.fstat(descriptor)) != identity or (
        outcome.verdict is Verdict.COMPACTED and decode(outcome.recipe).sha256_original != sha256
    ):
        return Done(path, "left", message="it changed while it was compacted")
    if outcome.reason is Reason.NO_MEMORY:
        return Done(path, "left", message=outcome.message)
    if outcome.verdict is not Verdict.COMPACTED:
        choice = __version__ if outcome.reason is Reason.ENGINE_ENDED else policy.preset
        return _remember(workshop, path, st, outcome, choice)
    blob = container.pack(outcome.avif, outcome.recipe, store.config.id_bytes, store.config.key_bytes)
    faults.reach("compact.packed")
    result = swap.swap_in(
        store,
        path,
        descriptor,
        identity,
        blob,
        sha256,
        lease_ok=workshop.lease_held,
        interrupted=lambda: claim.interrupted,
        barrier=workshop.claims.barrier(claim),
    )
    match result.status:
        case SwapStatus.DONE:
            return _remember_blob(workshop, path, outcome, st.st_size, result)
        case SwapStatus.METADATA:
            return _remember(workshop, path, st, _refusal(Reason.METADATA, result.message))
        case SwapStatus.HARD_LINKS:
            return _remember(workshop, path, st, _refusal(Reason.HARD_LINKS, result.message))
        case SwapStatus.UNAVAILABLE:
            return _remember_blocked(workshop, path, st, result.message, "file")
        case _:
            return Done(path, "left", message=result.message)


def _digest(descriptor: int, size: int) -> bytes | None:
    """The file's sha256; None when it is not ``size`` bytes long any more."""
    digest = hashlib.sha256()
    offset = 0
    while part := os.pread(descriptor, 1 << 20, offset):
        digest.update(part)
        offset += len(part)
        if offset > size:
            return None
    return digest.digest() if offset == size else None


def _ask_engine(workshop: Workshop, original: FileValue, claim: Claim, policy: Policy) -> Outcome | None:
    """The engine's answer; None when the claim was interrupted meanwhile."""
    # The store keeps a copy of each network that a recipe may name.
    family = registry.family(policy.network) if policy.preset != LOSSLESS else {}
    networks = {name: workshop.store.keep_network(path.read_bytes()) for name, path in family.items()}
    key = reference.key_of(workshop.store.config.key_bytes)
    ticket = workshop.engine.compact_ticket(original, policy, networks, key)
    return _result(ticket, claim)


def _rebuilds(workshop: Workshop, outcome: Outcome, claim: Claim, policy: Policy) -> bool:
    """Whether the blob of an outcome that nobody vouches for gives, rebuilt here, the very file that it is for."""
    recipe = decode(outcome.recipe)
    if recipe.megapixels > policy.max_megapixels or not _has_network(workshop.store, recipe):
        return False
    # A key of its own: nobody who reads a file with this content shall get what comes of this.
    key = hashlib.sha256(b"carried" + outcome.recipe + outcome.avif).digest()
    try:
        ticket = workshop.engine.rebuild(
            key, lambda: (outcome.recipe, outcome.avif), Lane.COMPACTION, megapixels=recipe.megapixels
        )
        rebuilt = _result(ticket, claim)
    except EngineError as error:
        log.info("a blob that came with a view is of no use here (%s)", error)
        return False
    return rebuilt is not None and rebuilt.sha256 == recipe.sha256_original


def _has_network(store: Store, recipe: Recipe) -> bool:
    """Whether the store can keep the network that the recipe names, and from now on does."""
    if not recipe.network_sha256:
        return True
    try:
        store.network_bytes(recipe.network_sha256)
    except StoreError:
        found = registry.with_sha256(recipe.network_sha256)
        return found is not None and store.keep_network(found[1]) == recipe.network_sha256
    return True


def _result(ticket: Ticket[_Answer], claim: Claim) -> _Answer | None:
    """The engine's answer; None when the claim was interrupted meanwhile."""
    try:
        while not ticket.done:
            if claim.interrupted:
                return None
            try:
                return ticket.wait(_POLL_SECONDS)
            except TimeoutError:
                continue
        return ticket.wait(_POLL_SECONDS)
    finally:
        ticket.release()


def _remember(workshop: Workshop, path: str, st: os.stat_result, outcome: Outcome, choice: str = "") -> Done:
    """Note a verdict against the file; ``choice``: what it was made under, if it might be another under another."""
    reason = outcome.reason.value if outcome.reason else ""
    workshop.catalog.put(
        Identity.from_stat(st),
        Entry(
            state=outcome.verdict.value,
            reason=reason,
            message=outcome.message,
            kind=outcome.kind,
            width=outcome.width,
            height=outcome.height,
            view_size=st.st_size,
            stored_bytes=st.st_blocks * 512,
            score=outcome.score,
            path=path,
            choice=choice,
        ),
    )
    return Done(path, outcome.verdict.value, reason, outcome.message, st.st_size, st.st_blocks * 512)


def _remember_original(workshop: Workshop, path: str, st: os.stat_result) -> Done:
    stored = st.st_blocks * 512
    entry = Entry(state="original", message=BROUGHT_BACK, view_size=st.st_size, stored_bytes=stored, path=path)
    workshop.catalog.put(Identity.from_stat(st), entry)
    return Done(path, entry.state, "", entry.message, st.st_size, stored)


def _remember_blocked(
    workshop: Workshop, path: str, st: os.stat_result, why: str, by: Literal["file", "folder"]
) -> Done:
    identity = Identity.from_stat(st)
    known = workshop.catalog.get(identity)
    if known is None or (known.state, known.message, known.path) != (BLOCKED, why, path):
        stored = st.st_blocks * 512
        entry = Entry(state=BLOCKED, message=why, view_size=st.st_size, stored_bytes=stored, path=path)
        workshop.catalog.put(identity, entry)
    return Done(path, "left", message=why, blocked_by=by)


def _remember_blob(workshop: Workshop, path: str, outcome: Outcome, original_bytes: int, result: SwapResult) -> Done:
    assert result.blob is not None
    stored = result.blob.size
    known = replace(_blob_entry(path, decode(outcome.recipe), -(-stored // 512) * 512), kind=outcome.kind)
    workshop.catalog.put(result.blob, known)
    return Done(path, Verdict.COMPACTED.value, "", outcome.message, original_bytes, stored)


def _entry_of(path: str, descriptor: int, st: os.stat_result, blob: BlobInfo) -> Entry:
    """What there is to know of a blob that the catalog does not know."""
    with contextlib.suppress(ValueError):
        recipe = recipe_of(descriptor, st, blob)
        if recipe is not None:
            return _blob_entry(path, recipe, st.st_blocks * 512)
    return Entry(state="blob", view_size=blob.view_size, stored_bytes=st.st_blocks * 512, path=path)


def _blob_entry(path: str, recipe: Recipe, stored_bytes: int) -> Entry:
    return Entry(
        state="blob",
        kind=identify(expand(recipe.prefix[:1])) if recipe.scan_length else "",
        width=recipe.width,
        height=recipe.height,
        view_size=recipe.original_size,
        stored_bytes=stored_bytes,
        sha256_view=recipe.sha256_view,
        score=recipe.scores.ssimulacra2,
        scale=recipe.scale,
        quality=recipe.quality,
        path=path,
        reference=recipe.reference,
    )
