"""Logging to standard error: for a person at a terminal, or for the journal, where systemd has connected it to that.

The journal takes each line for a message of its own, and ``<N>`` at its beginning for the priority (sd-daemon(3)).
"""

from __future__ import annotations

import logging
import os
import re

_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with what is no character to print as Python writes it: ``\\n``, ``\\x1b``, ``\\udcff``."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class OneLine(logging.Formatter):
    """File names are in messages, and hold whatever people and programs put there: a line break in one is not to begin
    a message of its own, nor an escape to reach a terminal."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        record.message = printable(record.message)
        return super().formatMessage(record)


class _ForJournal(OneLine):
    def format(self, record: logging.LogRecord) -> str:
        priority = next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def log_to_stderr(level: int = logging.INFO) -> None:
    """Let everything that is logged go to standard error."""
    handler = logging.StreamHandler()
    if _is_journal(2):
        handler.setFormatter(_ForJournal("%(name)s: %(message)s"))  # the journal adds time, process and level
    else:
        handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(level)


def _is_journal(descriptor: int) -> bool:
    """As systemd.exec(5) says it is found out: programs whose output goes elsewhere have the variable, too."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    st = os.fstat(descriptor)
    return (device, inode) == (str(st.st_dev), str(st.st_ino))
