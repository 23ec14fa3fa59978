"""Views that were open a moment ago: opening one again costs no look at its recipe, and none into the cache.

A view belongs to one content of one blob, so it stays right as long as it is asked for by the blob's whole identity.

Lock: ``_lock`` protects ``_views``; nothing is waited for under it. Views are closed when nobody refers to them any
more.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from esrfs.vfs.view import View

_MOST = 64
_MOST_BYTES = 16 << 20
"""What their recipes may hold verbatim: a motion photo's video lies in one."""

Identity = tuple[int, ...]


class Recent:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._views: OrderedDict[Identity, View] = OrderedDict()

    def get(self, identity: Identity) -> View | None:
        with self._lock:
            view = self._views.get(identity)
            if view is not None:
                self._views.move_to_end(identity)
            return view

    def add(self, identity: Identity, view: View) -> None:
        with self._lock:
            self._views[identity] = view
            while len(self._views) > _MOST or sum(each.verbatim_bytes for each in self._views.values()) > _MOST_BYTES:
                self._views.popitem(last=False)

    def drop(self, key: str) -> None:
        """Forget the views with this cache key: their photograph was deleted, or their content takes memory."""
        with self._lock:
            for identity in [identity for identity, view in self._views.items() if view.key == key]:
                del self._views[identity]

    def clear(self) -> None:
        with self._lock:
            self._views.clear()
