"""The options of a mount (``-o``): our own, those that libfuse takes, and those of fstab that are for others."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from typing import Literal, cast

from esrfs import prometheus
from esrfs.cache import DEFAULT_FREE_FLOOR, DEFAULT_SIZE_LIMIT

OWN = {
    "cache_size": "most bytes that rebuilt views may take in the cache, e.g. 20G (default 10G)",
    "cache_floor": "least free space that the cache leaves on its filesystem, e.g. 5G (default 2G)",
    "quiet": "seconds that a file must be unchanged before it is compacted (default 30)",
    "no_compaction": "only read and write; another mount or `esrfs compact` does the compaction",
    "device": "where networks run: auto, cpu or cuda (default auto)",
    "time_limit": "seconds after which a read that waits for a reconstruction fails with EIO (default 120)",
    "engine_idle": "seconds without work after which the engine gives its memory back (default 60)",
    "metrics": "[ADDRESS:]PORT at which Prometheus finds figures, e.g. 9420 (default: nowhere; address: 127.0.0.1)",
    "threads": "callbacks that may run at once; three quarters of them may wait (default 1024)",
}
"""Every option that esrfs itself knows, with its help."""

_LIBFUSE = frozenset(
    (
        "allow_other",
        "allow_root",
        "ro",
        "rw",
        "nodev",
        "dev",
        "nosuid",
        "suid",
        "noexec",
        "exec",
        "noatime",
        "sync",
        "async",
        "dirsync",
    )
)
_OTHERS = frozenset(
    ("defaults", "auto", "noauto", "user", "nouser", "users", "_netdev", "nofail", "default_permissions")
)
KNOWN_ELSEWHERE = tuple(sorted(_LIBFUSE | _OTHERS))
"""Options that are taken, but mean nothing of esrfs's own."""
_FOR_OTHERS = re.compile(r"x-[\w.\-]+(=.*)?|comment=.*|uhelper=.*")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class BadOption(ValueError):  # noqa: N818 (it reads better where it is raised)
    """The message names the option and what is accepted."""


@dataclass(frozen=True)
class MountOptions:
    cache_size: int = DEFAULT_SIZE_LIMIT
    cache_floor: int = DEFAULT_FREE_FLOOR
    quiet: float = 30.0
    compaction: bool = True
    device: Literal["auto", "cpu", "cuda"] = "auto"
    time_limit: float = 120.0
    engine_idle: float = 60.0
    threads: int = 1024
    metrics: tuple[str, int] | None = None
    read_only: bool = False
    libfuse: dict[str, str | bool] = field(default_factory=dict)


def parse(options: list[str]) -> MountOptions:
    """``options`` are single options (``name`` or ``name=value``). Raises BadOption."""
    parsed = MountOptions(libfuse={"allow_other": True} if os.geteuid() == 0 else {})
    for option in options:
        name, equals, value = option.partition("=")
        if name == "no_compaction" and not equals:
            parsed = replace(parsed, compaction=False)
        elif name in OWN and name != "no_compaction":
            parsed = _own(parsed, name, value)
        elif option in _LIBFUSE:
            parsed.libfuse[option] = True
            parsed = replace(parsed, read_only=option == "ro" or (parsed.read_only and option != "rw"))
        elif option not in _OTHERS and not _FOR_OTHERS.fullmatch(option):
            known = ", ".join([*OWN, *sorted(_LIBFUSE)])
            raise BadOption(f"unknown mount option {option!r}; esrfs knows {known}")
    return parsed


def _own(parsed: MountOptions, name: str, value: str) -> MountOptions:
    match name:
        case "cache_size":
            return replace(parsed, cache_size=_bytes(name, value))
        case "cache_floor":
            return replace(parsed, cache_floor=_bytes(name, value))
        case "device":
            if value not in ("auto", "cpu", "cuda"):
                raise BadOption(f"device={value}: it must be auto, cpu or cuda")
            return replace(parsed, device=cast(Literal["auto", "cpu", "cuda"], value))
        case "metrics":
            try:
                return replace(parsed, metrics=prometheus.parse_address(value))
            except ValueError as error:
                raise BadOption(f"metrics: {error}") from None
        case "threads":
            return replace(parsed, threads=int(_number(name, value, 16, 16384)))
        case "quiet":
            return replace(parsed, quiet=_number(name, value, 0, 86400 * 365))
        case "time_limit":
            return replace(parsed, time_limit=_number(name, value, 1, 86400))
        case _:
            return replace(parsed, engine_idle=_number(name, value, 1, 86400))


def _number(name: str, value: str, least: float, most: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = float("nan")
    if not least <= number <= most:
        raise BadOption(f"{name}={value}: it must be a number from {least:g} to {most:g}")
    return number


def _bytes(name: str, value: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", value, re.IGNORECASE)
    if not match:
        raise BadOption(f"{name}={value}: it must be a number of bytes, such as 500M or 20G")
    return int(float(match[1]) * _UNITS[match[2].upper()])
