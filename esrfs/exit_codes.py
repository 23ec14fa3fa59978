"""The exit codes of ``esrfs``: an interface, documented in README.md and held by a test. Numbers never change sense.

They lie beside ``config`` and not in ``cli``, since the mount answers a command with the code that it should end with.
"""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    OK = 0
    FAILED = 1
    """Part of the work, or all of it, failed; the message says which file and why."""
    USAGE = 2
    """The command line was not understood."""
    NOT_A_STORE = 3
    """The path is no store, no mountpoint of one, and in neither; or it does not exist."""
    NOT_MOUNTED = 4
    """The command needs a running mount of the store, and none answers."""
    REFUSED = 5
    """esrfs will not do this here, for a reason it names: a store within a store, a tree that is mirrored two-way …"""
    DAMAGE = 6
    """``check`` found something wrong with the store; or its settings or rules can't be understood."""
    BUSY = 7
    """Somebody else holds what the command needs: a mountpoint in use, the compactor's lease …"""
    PERMISSION = 8
    """Permission is lacking: the store, its mount or a file belongs to another user."""
    ENGINE = 9
    """The engine (the process that runs networks) failed or took too long."""
    MOUNT_FAILED = 10
    """The filesystem could not be mounted or unmounted."""
    NETWORK = 11
    """A network (weights) is unknown, or could not be downloaded or verified."""
    INTERNAL = 70
    """A bug in esrfs: please report it with the traceback in the log."""
    INTERRUPTED = 130
    """Ended by Ctrl-C."""
