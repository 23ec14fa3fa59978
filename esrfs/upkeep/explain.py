"""What esrfs knows of one file: behind ``esrfs explain`` and the attributes ``user.esrfs.*``.

Looks at the file, its recipe and the catalog; nothing is decoded or hashed, so it is cheap at any size.
"""

from __future__ import annotations

import os
import stat
from typing import Any, Literal

import msgspec

from esrfs.blob.container import BlobDamaged
from esrfs.blob.recipe import Coding, JpegCoding, kind_of
from esrfs.compaction.outcome import Reason
from esrfs.formats.identify import HEAD_BYTES, identify
from esrfs.store.beneath import beneath
from esrfs.store.catalog import BLOCKED, Catalog
from esrfs.store.examine import BlobInfo, examine, recipe_of
from esrfs.store.identity import Identity
from esrfs.store.layout import Store
from esrfs.upkeep import undo

State = Literal["original", "pending", "blob", "refused", "passed_through"]


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """What the gate measured on the view; of a refused file, the best that was reached."""

    ssimulacra2: float | None
    worst_tile: float | None = None
    """SSIMULACRA2 of the worst 256×256 tile."""
    psnr: float | None = None
    """dB."""
    colour: float | None = None
    """CIEDE2000 between blocks of 16×16 pixels, on average."""
    worst_colour: float | None = None
    """The same, which one block in a thousand exceeds."""


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of ``esrfs explain --json``; a key's meaning never changes. None where it does not apply or isn't
    known."""

    path: str
    """In the store and in its view."""
    state: State
    """``original``: left as it is and not looked at again (an original that was brought back); ``pending``: compaction
    has yet to look at it; ``blob``; ``refused`` and ``passed_through``: left as it is, see ``reason``."""
    reason: str | None = None
    """A stable identifier (esrfs.compaction.outcome.Reason)."""
    message: str | None = None
    """The reason in a sentence."""
    format: str | None = None
    """What its first bytes, or the recipe, say."""
    width: int | None = None
    """Pixels, as stored (EXIF orientation not applied)."""
    height: int | None = None
    original_bytes: int
    """st_size in the view."""
    stored_bytes: int
    """st_size in the store."""
    ratio: float
    """original_bytes / stored_bytes."""
    preset: str | None = None
    """The promise that a blob was made under."""
    scale: int | None = None
    """How much smaller the blob's picture is, in each direction: 1 to 4."""
    network: str | None = None
    codec_quality: int | None = None
    """AVIF quality of the blob's picture, 0 to 100."""
    quality: Quality | None = None
    sha256_original: str | None = None
    sha256_view: str | None = None
    undo_until: str | None = None
    """ISO date up to which the original can be brought back; None if it can't be. Days without esrfs don't count."""
    created_by: str | None = None


def explain(store: Store, catalog: Catalog, path: str) -> Explanation:
    """What is known of the regular file at ``path`` (relative to the root).

    Raises OSError: what stat or open say; ENOENT also for what the view doesn't show.
    """
    descriptor = beneath(store.root_fd, path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return explain_open(store, catalog, path, descriptor)
    finally:
        os.close(descriptor)


def explain_open(store: Store, catalog: Catalog, path: str, descriptor: int) -> Explanation:
    """:func:`explain` for a file that is open (for reading); ``path`` is for people."""
    st = os.fstat(descriptor)
    if not stat.S_ISREG(st.st_mode):
        return Explanation(
            path=path,
            state="passed_through",
            reason=Reason.NOT_A_PICTURE,
            message="esrfs looks at regular files only",
            original_bytes=st.st_size,
            stored_bytes=st.st_size,
            ratio=1.0,
        )
    info = examine(store, descriptor, st)
    if info is not None:
        return _of_blob(store, path, descriptor, st, info)
    entry = catalog.get(Identity.from_stat(st))
    known: dict[str, Any] = {}
    state: State = "pending"
    if entry is not None and entry.state in ("original", "refused", "passed_through"):
        state = entry.state  # type: ignore[assignment]  # one of the three, as was just tested
        known = {
            "reason": entry.reason or None,
            "message": entry.message or None,
            "width": entry.width or None,
            "height": entry.height or None,
            "quality": None if entry.score is None else Quality(ssimulacra2=entry.score),
        }
    elif entry is not None and entry.state == BLOCKED:
        known = {"message": f"it waits: {entry.message}"}
    return Explanation(
        path=path,
        state=state,
        format=(entry.kind if entry else "") or identify(os.pread(descriptor, HEAD_BYTES, 0)) or None,
        original_bytes=st.st_size,
        stored_bytes=st.st_size,
        ratio=1.0,
        **known,
    )


def _of_blob(store: Store, path: str, descriptor: int, st: os.stat_result, info: BlobInfo) -> Explanation:
    sizes = {
        "original_bytes": info.view_size,
        "stored_bytes": st.st_size,
        "ratio": round(info.view_size / st.st_size, 3),
    }
    try:
        recipe = recipe_of(descriptor, st, info)
    except BlobDamaged as error:
        recipe, damage = None, str(error)
    else:
        damage = "its recipe is missing"
    if recipe is None:
        return Explanation(
            path=path,
            state="blob",
            reason=Reason.BROKEN,
            message=f"{damage}; reading it fails. `esrfs check` tells more",
            **sizes,  # type: ignore[arg-type]  # as the fields are
        )
    return Explanation(
        path=path,
        state="blob",
        message=recipe.note or _how_it_fits(recipe.coding) or None,
        format=kind_of(recipe.coding),
        width=recipe.width,
        height=recipe.height,
        preset=recipe.preset,
        scale=recipe.scale,
        network=recipe.network or None,
        codec_quality=recipe.quality,
        quality=Quality(
            ssimulacra2=recipe.scores.ssimulacra2,
            worst_tile=recipe.scores.worst_tile,
            psnr=recipe.scores.psnr,
            colour=recipe.scores.colour,
            worst_colour=recipe.scores.worst_colour,
        ),
        sha256_original=recipe.sha256_original.hex(),
        sha256_view=recipe.sha256_view.hex(),
        undo_until=undo.until(store, recipe.sha256_original),
        created_by=recipe.created_by,
        **sizes,  # type: ignore[arg-type]  # as the fields are
    )


def _how_it_fits(coding: Coding) -> str:
    """What was done to the view so that it has the original's size; the scores were measured after it."""
    if isinstance(coding, JpegCoding) and coding.softened:
        return f"to fit the original's size, its view was softened (a low-pass of {coding.softened:g} pixels)"
    if isinstance(coding, JpegCoding) and coding.coarser != 1.0:
        return f"to fit the original's size, its view was quantised {coding.coarser:g} times more coarsely"
    return ""


def attributes(explanation: Explanation) -> dict[str, object]:
    """The explanation with nothing nested (``ssimulacra2``, ``worst_tile`` and so on instead of ``quality``), as the
    attributes ``user.esrfs.NAME`` show it. Values are numbers, text or None."""
    flat: dict[str, object] = msgspec.to_builtins(explanation)
    return {**flat, **(flat.pop("quality") or {})}  # type: ignore[dict-item]  # a struct becomes a dict
