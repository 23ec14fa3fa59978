"""The daemon's configuration: a TOML file, checked as a whole before anything is done. ``docs/daemon.md`` explains it.

Sizes are integers (bytes) or text such as ``"20M"`` (powers of 1000 for ``kB``/``MB``, of 1024 for ``K``/``M``/``G``);
times are seconds.
"""

from __future__ import annotations

import contextlib
import os
import re
import tomllib
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from esrfs_daemon.asking import NoAnswer, real_path

Then = Literal["keep", "trash", "delete", "symlink"]
"""What becomes of a source file whose copy is verified."""

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class ConfigError(Exception):
    """The message names the file, the place in it, and what is accepted."""


class Throttle(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How gently to work; applies to all rules together."""

    bytes_per_second: int | str = 0
    """Copied bytes; 0 for no limit."""
    idle_io: bool = True
    """Read sources in the kernel's idle I/O class (what is written, the mount writes in its own)."""
    on_battery: bool = False
    """Work while the machine runs on battery."""
    max_load: float = 0.0
    """Pause while the 1-minute load per CPU core is above this; 0 for no limit."""
    min_free: int | str = "2G"
    """Free space that the destination always keeps."""
    hours: str = ""
    """Local time in which to work, such as ``"22:00-06:30"``; empty for always."""


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    source: str
    """A folder; ``~`` is the home directory."""
    destination: str
    """A folder in a mount of esrfs; made when it is missing (the mount itself has to be there)."""
    name: str = ""
    """For the log and for status; the source's name if empty."""
    then: Then = "keep"
    include: list[str] = []
    """Patterns like ``*.jpg`` of names, or ``2024/*`` of paths in the source (case counts not); empty: all files."""
    exclude: list[str] = []
    quiet: float = 30.0
    """Seconds that a file must be unchanged before it is taken."""
    even_if_mirrored: bool = False
    """Also empty or link a source that Syncthing, Nextcloud, Dropbox … mirror to other devices."""
    polling: bool = False
    """Don't use file events, walk the folder every ``poll_seconds``."""
    poll_seconds: float = 60.0


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    rules: list[Rule]
    throttle: Throttle = Throttle()
    reconcile_seconds: float = 3600.0
    """Each source is walked in full at the start and so often, since events get lost."""
    journal: str = ""
    """Where the journal lies; ``$XDG_STATE_HOME/esrfs/migration.db`` if empty."""


class Hours(msgspec.Struct, frozen=True):
    """A span of the day in minutes since midnight; ``end`` before ``begin`` means over midnight."""

    begin: int
    end: int

    def includes(self, minute: int) -> bool:
        if self.begin <= self.end:
            return self.begin <= minute < self.end
        return minute >= self.begin or minute < self.end


def default_path() -> Path:
    """``$XDG_CONFIG_HOME/esrfs/daemon.toml``; for root ``/etc/esrfs/daemon.toml``, if that exists."""
    system = Path("/etc/esrfs/daemon.toml")
    if os.geteuid() == 0 and system.exists():
        return system
    return platformdirs.user_config_path("esrfs") / "daemon.toml"


def load(path: str | os.PathLike[str]) -> Config:
    """Read and check. Raises ConfigError; nothing but the file is looked at."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{os.fspath(path)}: {error.strerror}. An example is in docs/daemon.md; --config names another file."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{os.fspath(path)}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    try:
        config = msgspec.convert(tomllib.loads(text), Config)
        _check(config)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"{os.fspath(path)}: {error}") from error
    return config


def _check(config: Config) -> None:
    if not config.rules:
        raise ValueError("there is no [[rules]] with source and destination, so there is nothing to do")
    size(config.throttle.bytes_per_second, "throttle.bytes_per_second")
    size(config.throttle.min_free, "throttle.min_free")
    hours(config.throttle.hours)
    if config.throttle.max_load < 0:
        raise ValueError("throttle.max_load: must be 0 (no limit) or more")
    if config.reconcile_seconds < 1:
        raise ValueError("reconcile_seconds: must be at least 1")
    seen: set[str] = set()
    for number, rule in enumerate(config.rules, 1):
        where = f"rules[{number}]"
        for key, value in (("source", rule.source), ("destination", rule.destination)):
            if not os.path.isabs(os.path.expanduser(value)):
                raise ValueError(f"{where}.{key}: {value!r} must be an absolute path, or begin with ~")
        if rule.quiet < 0 or rule.poll_seconds < 1:
            raise ValueError(f"{where}: quiet must be at least 0 and poll_seconds at least 1")
        source = expanded(rule.source)
        with contextlib.suppress(NoAnswer):  # then two names of one folder are found out when the second is begun
            source = real_path(source)
        if source in seen:
            raise ValueError(f"{where}.source: {rule.source} has a rule already; a folder can have one")
        seen.add(source)


def expanded(path: str) -> str:
    """``~`` expanded, made absolute and plain; symlinks stay."""
    return os.path.abspath(os.path.expanduser(path))


def size(value: int | str, what: str = "size") -> int:
    """Bytes, from a number or text such as ``"20M"``. Raises ValueError that names ``what``."""
    if isinstance(value, int):
        number = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?B)?\s*", value)
        unit = "" if match is None else match[2].upper() + ("B" if match[3] == "B" else "")
        if match is None or unit not in {**_UNITS, "B": 1}:
            raise ValueError(f'{what}: {value!r} is no size; write a number of bytes, or text such as "20M"')
        number = int(float(match[1]) * {**_UNITS, "B": 1}[unit])
    if number < 0:
        raise ValueError(f"{what}: must not be negative")
    return number


def hours(text: str) -> Hours | None:
    """From ``"HH:MM-HH:MM"``; None for empty text (always). Raises ValueError."""
    if not text:
        return None
    match = re.fullmatch(r"\s*(\d{1,2}):(\d{2})\s*-\s*(\d{1,2}):(\d{2})\s*", text)
    if match is not None:
        begin, end = int(match[1]) * 60 + int(match[2]), int(match[3]) * 60 + int(match[4])
        if int(match[2]) < 60 and int(match[4]) < 60 and begin < 1440 and end <= 1440 and begin != end:
            return Hours(begin, end)
    raise ValueError(f'throttle.hours: {text!r} is no span of the day; write it like "22:00-06:30"')
