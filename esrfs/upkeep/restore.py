"""Bringing originals back. In a mounted store only the mount does this: it knows which files are in use."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from esrfs.blob.recipe import Recipe
from esrfs.store import plain
from esrfs.store.beneath import beneath
from esrfs.store.catalog import Catalog, Entry
from esrfs.store.errors import Problem, StoreError
from esrfs.store.examine import examine, may_be_blob
from esrfs.store.identity import Identity
from esrfs.store.layout import Store
from esrfs.upkeep import undo, walk
from esrfs.upkeep.claims import Claims
from esrfs.upkeep.compact import BROUGHT_BACK

log = logging.getLogger("esrfs.upkeep")


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    path: str
    state: Literal["restored", "failed"]
    message: str = ""
    """Why not, and what is the case now; or which original it is, if there are two. A sentence for people, which names
    the file."""


def restore(
    store: Store,
    paths: Sequence[str],
    on_progress: Callable[[int, int, str], None] = lambda done, total, path: None,
    *,
    catalog: Catalog,
    claims: Claims | None = None,
    first: bool = False,
) -> list[Restored]:
    """Bring back the original of each compacted file at and below ``paths``; one result for each.

    A path that names a file which is not compacted fails; below a folder such files are no result. What was brought
    back is left alone by compaction until somebody asks for it by name (catalog state ``original``; where that is
    lost, ``asked_back`` knows). ``claims``: the mount's; a file that is open there fails. ``first``: of photographs
    that programs have rewritten since (captions, ratings), what was there before, where the window has it. Trouble
    with one file does not keep the others from being tried. Raises OSError for a path that does not exist."""
    claims = claims or Claims()
    named = set(paths)
    wanted = [found.path for found in walk.files(store, paths) if found.path in named or _is_blob(store, found)]
    results = []
    for number, path in enumerate(wanted, 1):
        on_progress(number, len(wanted), path)
        choice = _Choice(store, first)
        try:
            descriptor = _restore(store, path, claims, choice)
        except StoreError as error:
            results.append(Restored(path=path, state="failed", message=str(error)))
        except OSError as error:
            message = f"{path}: {error.strerror or error}; the file is as it was"
            results.append(Restored(path=path, state="failed", message=message))
        else:
            try:
                st = os.fstat(descriptor)
            finally:
                os.close(descriptor)
            known = Entry(
                state="original",
                message=BROUGHT_BACK,
                view_size=st.st_size,
                stored_bytes=st.st_blocks * 512,
                path=path,
            )
            catalog.put(Identity.from_stat(st), known)
            log.info("%s: the original was brought back", path)
            results.append(
                Restored(path=path, state="restored", message=f"{path}: {choice.said}" if choice.said else "")
            )
    return results


@dataclass
class _Choice:
    """Which original, and what is said of it."""

    store: Store
    first: bool
    said: str = ""

    def __call__(self, recipe: Recipe) -> bytes:
        earlier = undo.first(self.store, recipe)
        if earlier is None:
            return recipe.sha256_original
        if self.first:
            self.said = "this is what was there first, without what a program has written into it since"
            return earlier
        self.said = (
            "this is the file as a program rewrote it. What was there first is in the undo window, too: with --first "
            "it comes back, after this file was compacted again (esrfs compact --now)"
        )
        return recipe.sha256_original


def _restore(store: Store, path: str, claims: Claims, choice: _Choice) -> int:
    """A descriptor of the original, which is back in its place. Raises OSError, StoreError."""
    blob = beneath(store.root_fd, path, os.O_PATH | os.O_NOFOLLOW)
    try:
        st = os.fstat(blob)
        in_use = StoreError(f"{path} is in use; it was left as it is. Close it and try again.", Problem.BUSY)
        claim = claims.take((st.st_dev, st.st_ino))
        if claim is None:
            raise in_use
        try:
            with claims.barrier(claim):
                if claim.interrupted:
                    raise in_use
                return plain.restore(store, path, choice)
        finally:
            claims.end(claim)
    finally:
        os.close(blob)


def _is_blob(store: Store, found: walk.Found) -> bool:
    if not may_be_blob(found.st):
        return False
    try:
        descriptor = beneath(found.directory, found.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        return examine(store, descriptor, os.fstat(descriptor)) is not None
    except OSError:
        return True  # it can't be read: that is to be said, not passed over
    finally:
        os.close(descriptor)
