"""A program may write a file into the mount that is, byte for byte, a blob of this very store (copied from the store,
or from a backup of it). It must come back as it was written, and not as the photograph that the blob stands for. So
when the last handle that wrote it is released, it is put into a blob of its own, whose recipe holds all of it.

Until then it is shown as it is, since it is open as a plain file. If the mount is killed in this moment, the
photograph is shown; the bytes are all there (`esrfs check` names no such file: it can't know what was meant).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time

from esrfs import __version__
from esrfs.blob import container
from esrfs.blob import recipe as recipe_format
from esrfs.blob.recipe import Literal, Recipe, Scores, Verbatim
from esrfs.store import swap
from esrfs.store.examine import examine, is_damaged, may_be_blob
from esrfs.store.identity import Identity
from esrfs.store.layout import Store
from esrfs.store.swap import SwapStatus
from esrfs.vfs.handles import OpenFile

log = logging.getLogger("esrfs.vfs")

_TRIES = 10
_PAUSE_SECONDS = 0.05


def wrap_if_needed(store: Store, file: OpenFile, descriptor: int) -> None:
    """Wrap ``file``, a plain file that is open for reading as ``descriptor``, if it would be taken for a blob. Never
    raises; what fails is in the log.

    The program that wrote it goes on meanwhile: it sets times and owner, renames the file, or opens it again (then
    that handle's end is the time to wrap it).
    """
    why = ""
    try:
        for attempt in range(_TRIES):
            time.sleep(attempt * _PAUSE_SECONDS)
            st = os.fstat(descriptor)
            if not may_be_blob(st):
                return
            if examine(store, descriptor, st) is None and not is_damaged(store, descriptor, st):
                return
            if file.removed or any(handle.writable for handle in list(file.handles)):
                return
            data = os.pread(descriptor, st.st_size, 0)
            result = swap.swap_in(
                store,
                file.path,
                descriptor,
                Identity.from_stat(st),
                _wrapped(store, data),
                hashlib.sha256(data).digest(),
                lease_ok=lambda: True,
                interrupted=lambda: False,
            )
            if result.status is SwapStatus.DONE:
                return
            why = result.message
            if result.status not in (SwapStatus.CHANGED, SwapStatus.BUSY):
                break
    except (OSError, ValueError) as error:
        why = str(error)
    log.error(
        "%s: it is a blob of this store and could not be wrapped (%s): it is shown as the photograph that it stands "
        "for. The bytes that were written are in the store.",
        file.path,
        why,
    )


def _wrapped(store: Store, data: bytes) -> bytes:
    avif, width, height, preset, quality = data, 0, 0, "", 0
    with contextlib.suppress(ValueError):  # a damaged one: its footer alone would have it taken for a blob
        inner = container.unpack(data)
        avif, width, height = inner.avif, inner.recipe.width, inner.recipe.height
        preset, quality = inner.recipe.preset, inner.recipe.quality
    digest = hashlib.sha256(data).digest()
    recipe = Recipe(
        width=width,
        height=height,
        original_size=len(data),
        sha256_original=digest,
        sha256_view=digest,
        preset=preset,
        scale=1,
        network="",
        network_sha256=b"",
        quality=quality,
        coding=Verbatim(),
        prefix=[Literal(data)],
        scan_length=0,
        suffix=[],
        encoder="",
        scores=Scores(ssimulacra2=100.0, worst_tile=100.0, psnr=99.0),
        created_by=f"esrfs {__version__}",
    )
    return container.pack(avif, recipe_format.encode(recipe), store.config.id_bytes, store.config.key_bytes)
