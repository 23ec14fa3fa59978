"""Is this file a blob of this store, and what does its view look like? One read of 64 bytes, for likely sizes only."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass

from esrfs.blob import container
from esrfs.blob.recipe import Recipe
from esrfs.store.layout import Store


@dataclass(frozen=True, slots=True)
class BlobInfo:
    view_size: int
    """st_size of the view, bytes."""
    footer: container.Footer


def may_be_blob(st: os.stat_result) -> bool:
    """False for what :func:`examine` need not be asked about: no file has to be opened to know."""
    return stat.S_ISREG(st.st_mode) and container.may_be_blob(st.st_size)


def examine(store: Store, fd: int, st: os.stat_result) -> BlobInfo | None:
    """``fd`` (readable; its position is not used) with its stat: a blob of this store, or None: shown as it is.

    Raises OSError when the file can't be read.
    """
    if not may_be_blob(st):
        return None
    footer = container.read_footer(fd, st.st_size, store.config.id_bytes, store.config.key_bytes)
    return None if footer is None else BlobInfo(footer.view_size, footer)


def is_damaged(store: Store, fd: int, st: os.stat_result) -> bool:
    """Whether a file that :func:`examine` does not know was a blob of this store, and its last bytes rotted.

    Raises OSError when the file can't be read.
    """
    return may_be_blob(st) and container.footer_is_damaged(fd, st.st_size, store.config.id_bytes)


def recipe_of(fd: int, st: os.stat_result, info: BlobInfo) -> Recipe | None:
    """The recipe of a file that :func:`examine` knows. Raises BlobDamaged (a ValueError) and OSError."""
    return container.read_recipe(fd, st.st_size, info.footer)
