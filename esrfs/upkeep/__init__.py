"""The work behind the mount: compaction of files at rest, and the looking-after of a store, mounted or not.

Rooms: ``compact`` (one file, from verdict to swap), ``scheduler`` (which file when), ``claims`` (keeping out of
programs' way), ``walk`` (all files of a store), ``explain``, ``status``, ``check``, ``restore``.
"""
