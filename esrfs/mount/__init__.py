"""The mount: FUSE, and the life of the process that serves it.

Rooms: ``binding`` (chooses libfuse3), ``adapter`` (FUSE callbacks to vfs operations; with ``binding`` the only
importer of mfusepy), ``threads`` (libfuse's), ``options`` (``-o``), ``guard`` (the directory below), ``lifecycle``
(start, recovery, signals, end), ``commands`` (what the control socket answers), ``privileges`` (capabilities, signals
of systemd).
"""
