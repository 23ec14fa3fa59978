"""What the operations of one mounted filesystem have in common: the rooms that they use, and the paths that they take.

``filesystem`` makes one :class:`Shared`, and hands it to the modules that open, change and rename files.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from esrfs.cache import ViewCache
from esrfs.engine.client import Engine
from esrfs.store.layout import RESERVED, Store
from esrfs.store.nameless import Nameless
from esrfs.upkeep.claims import Claims
from esrfs.vfs.attributes import Attributes
from esrfs.vfs.directories import Directories
from esrfs.vfs.handles import Handles
from esrfs.vfs.recent import Recent
from esrfs.vfs.removed import Removed
from esrfs.vfs.view import Waits
from esrfs.vfs.xattrs import Capabilities


@dataclass(eq=False)
class Shared:
    """Each has its own lock, which its module tells of."""

    store: Store
    engine: Engine
    cache: ViewCache
    claims: Claims
    waits: Waits
    on_change: Callable[[str], None]
    """Told each path whose file came to rest after a change."""
    errors_at_close: bool
    """The store's filesystem may tell of a failed write only at close."""
    gives_away: bool
    """What is created belongs to who asked for it, and not to who runs the mount: root does."""
    handles: Handles = field(init=False, default_factory=Handles)
    recent: Recent = field(init=False, default_factory=Recent)
    capabilities: Capabilities = field(init=False, default_factory=Capabilities)
    directories: Directories = field(init=False)
    attributes: Attributes = field(init=False)
    removed: Removed = field(init=False)
    nameless: Nameless = field(init=False)

    def __post_init__(self) -> None:
        self.claims.is_open = self.handles.is_open
        self.directories = Directories(self.store.root_fd)
        self.attributes = Attributes(self.store, self.handles.is_plain)
        self.removed = Removed(self.store)
        self.nameless = Nameless(self.store)


def visible(path: str) -> str:
    """``path``, unless it lies in the reserved directory. Raises ENOENT."""
    if path.startswith(RESERVED) and (len(path) == len(RESERVED) or path[len(RESERVED)] == "/"):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    return path


def creatable(path: str) -> str:
    """``path``, unless it lies in the reserved directory. Raises EPERM."""
    if path.startswith(RESERVED) and (len(path) == len(RESERVED) or path[len(RESERVED)] == "/"):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))
    return path


def is_writable(flags: int) -> bool:
    """Whether an open with these flags may write."""
    return (flags & os.O_ACCMODE) != os.O_RDONLY
