"""Where networks lie, by name: shipped with esrfs, added by the user, or official ones to be downloaded. Never
imports torch.

A network's name is its file's name without suffix: ``lite-x2`` is ``lite-x2.safetensors``. Shipped networks lie in
the wheel (``esrfs/weights``) or, in a checkout, in ``weights/`` beside the package. Added and downloaded ones lie
in ``$XDG_DATA_HOME/esrfs/weights``. One name means one network: what is shipped or official can't be shadowed.

A network that makes pictures small for another is called ``shrink-`` and the other's name: ``shrink-lite-x2``.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import platformdirs

from esrfs import whole
from esrfs.networks import spec
from esrfs.networks.spec import NetworkSpec

SUFFIXES = (".safetensors", ".pth")

SHRINKER = "shrink-"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_CHUNK = 1 << 18
_LARGEST_BYTES = 1 << 30
"""What a download may amount to where the manifest names no size."""
_TIMEOUT_SECONDS = 30.0


class WeightsError(Exception):
    """For people: which network or file, what happened, what to do."""


class Official(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A section of ``weights/manifest.toml``; its title is the name."""

    url: str
    sha256: str
    licence: str
    architecture: spec.Architecture
    scale: int
    description: str
    bytes: int | None = None


class Listed(msgspec.Struct, frozen=True):
    """A network as ``esrfs weights list`` shows it."""

    name: str
    origin: Literal["shipped", "user", "official"]
    """``official``: can be pulled, is not here yet."""
    path: Path | None
    bytes: int | None
    spec: NetworkSpec | None
    """For files that carry one (``.pth`` files don't)."""
    official: Official | None


def shipped_directory() -> Path:
    """``esrfs/weights`` of an installed wheel, else ``weights/`` of a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "weights"
    return inside if inside.is_dir() else package.parent / "weights"


def user_directory() -> Path:
    """Where added and downloaded networks lie; it need not exist."""
    return platformdirs.user_data_path("esrfs") / "weights"


def official() -> dict[str, Official]:
    """The manifest of official weights, by name."""
    text = (shipped_directory() / "manifest.toml").read_text()
    return msgspec.convert(tomllib.loads(text), dict[str, Official])


def names() -> list[str]:
    """The networks that are here, shipped ones first."""
    return [listed.name for listed in listing() if listed.path is not None]


def enlargers() -> list[str]:
    """Those of them that enlarge pictures."""
    return [name for name in names() if not name.startswith(SHRINKER)]


def textured() -> dict[str, int]:
    """Those whose files say that they were trained for texture (adversarial partners of networks trained for fidelity,
    and mixtures of both), by name, with their scale."""
    return {
        listed.name: listed.spec.scale for listed in listing() if listed.spec is not None and listed.spec.texture > 0
    }


def find(name: str) -> Path:
    """The file of the network called ``name``. Raises WeightsError, saying what to do, when it is not here."""
    path = _anywhere(name)
    if path is not None:
        return path
    if name in official():
        raise WeightsError(f"the weights of {name} are not here yet; `esrfs weights pull {name}` downloads them")
    raise WeightsError(f"there is no network called {name!r}; esrfs has {', '.join(names())}")


def file_or_name(text: str) -> Path:
    """The file called ``text``, if it looks like one of weights; else that of the network called so, as :func:`find`
    tells."""
    path = Path(text)
    return path if path.suffix in SUFFIXES else find(text)


def is_name(text: str) -> bool:
    """Whether a network can be called so."""
    return _NAME.fullmatch(text) is not None


def enlarger(name: str) -> Path:
    """As :func:`find`, of a network that enlarges pictures."""
    if name.startswith(SHRINKER):
        enlarges = name.removeprefix(SHRINKER)
        raise WeightsError(f"{name} makes pictures small; name the network that enlarges them, {enlarges}")
    return find(name)


def family(name: str) -> dict[str, Path]:
    """The files of the networks that a policy's ``network`` means, by name: NAME-x1 to NAME-x4 as far as they are here,
    or else the one called NAME; and the shrinkers made for them. Raises WeightsError when there is none."""
    found = {member: path for scale in range(1, 5) if (path := _anywhere(member := f"{name}-x{scale}")) is not None}
    found = found or {name: enlarger(name)}
    shrinkers = {SHRINKER + member: _anywhere(SHRINKER + member) for member in found}
    return found | {member: path for member, path in shrinkers.items() if path is not None}


def with_sha256(sha256: bytes) -> tuple[Path, bytes] | None:
    """The file that has this digest, and its content, whatever its name; None if it is not here. Reads them all."""
    for path in (*_files(shipped_directory()), *_files(user_directory())):
        with contextlib.suppress(OSError):
            data = path.read_bytes()
            if hashlib.sha256(data).digest() == sha256:
                return path, data
    return None


def listing() -> list[Listed]:
    """Every network that is here or could be pulled: shipped, then the user's, then official ones."""
    catalogue = official()
    result: list[Listed] = []
    origins: list[tuple[Literal["shipped", "user"], Path]] = [
        ("shipped", shipped_directory()),
        ("user", user_directory()),
    ]
    for origin, directory in origins:
        for path in _files(directory):
            size = path.stat().st_size
            result.append(Listed(path.stem, origin, path, size, read_spec(path), catalogue.get(path.stem)))
    here = {listed.name for listed in result}
    result += [
        Listed(name, "official", None, entry.bytes, None, entry)
        for name, entry in catalogue.items()
        if name not in here
    ]
    return result


def read_spec(path: Path) -> NetworkSpec | None:
    """What one of esrfs's own weights files says of itself; None for other files."""
    if path.suffix != ".safetensors":
        return None
    with path.open("rb") as file:
        length = file.read(8)
        header = length + file.read(min(int.from_bytes(length, "little"), 1 << 20))
    try:
        metadata = spec.read_metadata(header)
        return None if metadata is None else spec.decode(metadata)
    except ValueError:
        return None


def add(path: Path, name: str = "") -> Path:
    """Copy a weights file into the user's directory, as ``name`` (its own name if empty); returns where it is now.

    Looks at the file's beginning only: whether the tensors fit is seen by who loads it.
    Raises WeightsError when the file is no weights file, or the name is taken by another.
    """
    name = name or path.stem
    check_kind(path)
    if not is_name(name):
        raise WeightsError(f"{name!r} can't name a network: use letters, digits, dot, dash and underscore")
    if name in official():
        raise WeightsError(f"{name} is the name of official weights; use another name, or `esrfs weights pull {name}`")
    shrinks = (described := read_spec(path)) is not None and described.architecture == "Shrinker"
    if shrinks != name.startswith(SHRINKER):
        raise WeightsError(
            f"{path} makes pictures small; name it {SHRINKER}NETWORK, after the network that it was made for"
            if shrinks
            else f"{name!r} would be a network that makes pictures small, and {path} is none; use another name"
        )
    target = user_directory() / (name + path.suffix.lower())
    for taken in filter(None, (_file(shipped_directory(), name), _file(user_directory(), name))):
        if taken == target and _sha256(taken) == _sha256(path):
            return target
        raise WeightsError(f"there is a network called {name} already, {taken}; use another name, or remove that file")
    target.parent.mkdir(parents=True, exist_ok=True)
    whole.write(target, path.read_bytes())
    return target


def pull(
    name: str,
    destination: Path | None = None,
    *,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
    catalogue: Mapping[str, Official] | None = None,
) -> Path:
    """Download the official weights called ``name`` into ``destination`` (the user's directory); returns the file.

    What was downloaded before an interruption is kept as ``FILE.partial`` and continued. The file appears only when its
    SHA-256 is the manifest's; what doesn't match is removed. ``progress`` is called with bytes done and in all (None if
    unknown). Raises WeightsError for an unknown name, a failed download, or a mismatch.
    """
    catalogue = official() if catalogue is None else catalogue
    entry = catalogue.get(name)
    if entry is None:
        raise WeightsError(f"there are no official weights called {name!r}; the manifest has {', '.join(catalogue)}")
    directory = user_directory() if destination is None else destination
    target = directory / (name + ".pth")
    if target.exists() and _sha256(target) == entry.sha256:
        return target
    directory.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + ".partial")
    if not (partial.exists() and _sha256(partial) == entry.sha256):  # complete, but killed before the rename
        _download(name, entry, partial, progress)
        found = _sha256(partial)
        if found != entry.sha256:
            partial.unlink()
            raise WeightsError(
                f"what {entry.url} sent is not {name}: its SHA-256 is {found}, expected {entry.sha256}; it was removed"
            )
    os.replace(partial, target)
    return target


def _download(name: str, entry: Official, partial: Path, progress: Callable[[int, int | None], None]) -> None:
    """Append to ``partial`` what it lacks, or write it anew where the server can't continue."""
    import http.client  # noqa: PLC0415 (the mount finds networks and never downloads: urllib costs it time and memory)
    import urllib.error  # noqa: PLC0415
    import urllib.request  # noqa: PLC0415

    limit = entry.bytes or _LARGEST_BYTES
    done = partial.stat().st_size if partial.exists() else 0
    if done >= limit:  # complete but wrong, or not ours: pull() has looked at its hash
        done = 0
    request = urllib.request.Request(entry.url, headers={"User-Agent": "esrfs"})
    if done:
        request.add_header("Range", f"bytes={done}-")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:
            if response.status != http.HTTPStatus.PARTIAL_CONTENT:
                done = 0
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {done}-"):
                raise WeightsError(f"{entry.url} did not continue where asked; remove {partial} and try again")
            remaining = response.headers.get("Content-Length")
            total = entry.bytes or (done + int(remaining) if remaining else None)
            with partial.open("ab" if done else "wb") as file:
                while chunk := response.read(_CHUNK):
                    done += len(chunk)
                    if done > limit:
                        break  # more than it can be: the hash won't match
                    file.write(chunk)
                    progress(done, total)
        if total is not None and done < total:
            raise WeightsError(
                f"the download of {name} stopped after {done} of {total} bytes; the same command goes on from there"
            )
    except urllib.error.HTTPError as error:
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            partial.unlink()  # longer than what the server has
        raise WeightsError(f"{name} could not be downloaded from {entry.url}: {error}; try again later") from error
    except (OSError, http.client.HTTPException) as error:
        raise WeightsError(
            f"{name} could not be downloaded from {entry.url}: {error}; the same command goes on where this one stopped"
        ) from error


def check_kind(path: Path) -> None:
    """By its name and how it begins. Raises WeightsError when it is no weights file."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise WeightsError(f"{path} can't be read: {error.strerror}") from error
    safetensors = path.suffix.lower() == ".safetensors" and head[8:9] == b"{"
    # torch.save writes a zip since 1.6, a pickle before.
    pth = path.suffix.lower() == ".pth" and (head[:2] == b"PK" or head[:1] == b"\x80")
    if not safetensors and not pth:
        raise WeightsError(f"{path} is neither safetensors nor a .pth file of weights")


def _anywhere(name: str) -> Path | None:
    return _file(shipped_directory(), name) or _file(user_directory(), name)


def _files(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    found = (path for path in directory.iterdir() if path.suffix in SUFFIXES and path.is_file())
    return sorted(found, key=lambda path: (path.stem, path.suffix))


def _file(directory: Path, name: str) -> Path | None:
    if not is_name(name):
        return None
    return next((path for suffix in SUFFIXES if (path := directory / (name + suffix)).is_file()), None)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
